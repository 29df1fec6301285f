"""A queue of tasks for worker processes of a Ray cluster (P. Moritz et al., arXiv:1712.05889).

Every worker loads its model once and takes the next task when it has finished one, so a slow task or machine does not
delay the others. A task of a worker that died goes to another worker first, and a new worker replaces the dead one.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

_log = logging.getLogger("dit_sparse")

ENGINES = ("local", "ray")
MAX_DEATHS = 3  # workers that may die on one task, such as one that needs more memory than the machine has
POLL_SECONDS = 0.5
PATIENCE_SECONDS = 60.0  # without any worker, before a warning
OBJECT_STORE_BYTES = 100 * 2**20  # tasks and results are small; clips are written by the workers


class Worker(Protocol):
    """What runs in every process. It is made in the process, and loads its model when it is made."""

    def describe(self) -> dict:
        """Return plain values that name the process and its device."""
        ...

    def run(self, task: Any) -> Any: ...


def check_engine(engine: str, workers: int | None = None) -> None:
    """Raise ValueError if there is no such engine, if Ray is not installed, or if processes are started twice."""
    if engine not in ENGINES:
        raise ValueError(f"--engine must be {' or '.join(ENGINES)}, got {engine[:60]!r}")
    if engine == "local" and workers is not None:
        raise ValueError("--workers is the number of processes of --engine ray")
    if engine == "ray":
        _import_ray()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("--engine ray starts its workers itself: run the command without accelerate launch")


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_worker_niceness", "0"
    )  # of Ray: 15, which slows workers down on a machine with more to do
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the default of later versions of Ray
    try:
        import ray
    except ImportError:
        raise ValueError("--engine ray needs Ray: pip install 'dit-sparse[ray]'") from None
    return ray


class _Process:
    """The actor: a worker in a process of its own."""

    def __init__(self, make_worker: Callable[[], Worker], folder: str) -> None:
        self.make_worker, self.worker = make_worker, None
        with suppress(OSError):  # relative paths of models and profiles
            os.chdir(folder)

    def load(self) -> dict:
        self.worker = self.make_worker()
        return self.worker.describe()

    def run(self, task: Any) -> Any:
        return self.worker.run(task)


@dataclass(eq=False)
class _Actor:
    """A worker as the queue sees it: what it computes now, None if it is idle; ``task`` is None while it loads."""

    handle: Any
    future: Any
    task: int | None = None


class RayPool:
    """Workers of a Ray cluster: of the running one, see ``ray start``, or of a new one on this machine.

    Args:
        make_worker: makes a worker; pickled.
        workers: number of workers. Default: one for each GPU of the cluster, or for each machine if there is no GPU.
            Workers for which there is no room start later.
        at_most: number of workers that have something to do.
        same: keys of ``Worker.describe`` that must be equal in all workers; others than the first are left out.

    Attributes:
        described: what the first worker describes; None until it has loaded.

    Raises:
        ValueError: Ray is not installed, or ``workers`` is less than 1.
    """

    def __init__(
        self,
        make_worker: Callable[[], Worker],
        workers: int | None = None,
        same: Sequence[str] = (),
        at_most: int | None = None,
    ) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"--workers must be at least 1, got {workers}")
        self.ray, self.make_worker, self.same = _import_ray(), make_worker, same
        self.described: dict | None = None
        self._actors: list[_Actor] = []
        self._failed_starts, self._first_error, self._last_news = 0, "", time.monotonic()
        self._owns_cluster = not self.ray.is_initialized()
        if self._owns_cluster:
            _connect(self.ray, workers)
        self._options, number = _resources(self.ray, workers)
        for _ in range(min(number, at_most or number)):
            self._start()

    def run(
        self,
        tasks: Sequence[Any],
        on_result: Callable[[int, Any], None],
        on_failure: Callable[[int, str], None],
        on_poll: Callable[[], None] = lambda: None,
    ) -> None:
        """Run all tasks, each one once unless its worker dies.

        Args:
            tasks: pickled when they are sent to a worker.
            on_result: called with the number of a task and its result.
            on_failure: called with the number of a task that raised an error, or on which several workers died, and the
                reason.
            on_poll: called at least every second. It may raise an error to stop.

        Raises:
            ValueError: no worker could load its model; the message is the first error.
            RuntimeError: the workers die while they load.
        """
        waiting, deaths, left = deque(range(len(tasks))), Counter[int](), len(tasks)
        while left:
            for actor in self._actors:
                if actor.future is None and waiting:
                    actor.task = waiting.popleft()
                    actor.future = actor.handle.run.remote(tasks[actor.task])
            for actor, result, reason, died in self._finished(on_poll):
                task, actor.task, actor.future = actor.task, None, None
                if died:
                    self._replace(actor)
                if task is None:
                    continue
                deaths[task] += died
                if died and deaths[task] < MAX_DEATHS:
                    waiting.appendleft(task)
                    continue
                left -= 1
                if died or reason:
                    on_failure(task, f"the worker died {MAX_DEATHS} times: {reason}" if died else reason)
                else:
                    on_result(task, result)

    def wait_for_first(self, on_poll: Callable[[], None] = lambda: None) -> dict:
        """Return what the first worker describes when it has loaded. Raises as `run`."""
        while self.described is None:
            for actor, _, _, died in self._finished(on_poll):
                actor.future = None
                if died:
                    self._replace(actor)
        return self.described

    def close(self) -> None:
        """End all workers at once, and the cluster if this pool started it."""
        for actor in self._actors:
            self._kill(actor)
        self._actors.clear()
        if self._owns_cluster:
            self.ray.shutdown()

    def _finished(self, on_poll: Callable[[], None]) -> list[tuple[_Actor, Any, str, bool]]:
        """Wait a moment, and return actor, result, error and whether the actor died, for those that are ready."""
        if not self._actors:
            raise ValueError(self._first_error)
        futures = {actor.future: actor for actor in self._actors if actor.future is not None}
        ready, _ = self.ray.wait(list(futures), num_returns=len(futures), timeout=0)
        if not ready:
            ready, _ = self.ray.wait(list(futures), timeout=POLL_SECONDS)
        on_poll()
        self._warn_without_workers(bool(ready))
        return [(futures[future], *self._get(futures[future])) for future in ready]

    def _warn_without_workers(self, has_news: bool) -> None:
        """Log that nothing can happen: all workers are loading, or wait for room on the cluster."""
        now = time.monotonic()
        if has_news or any(actor.task is not None for actor in self._actors):
            self._last_news = now
        elif now - self._last_news > PATIENCE_SECONDS:
            self._last_news = now
            needed = f"{self._options['num_cpus']} CPUs" + (" and a GPU" if "num_gpus" in self._options else "")
            _log.warning("no worker has loaded its model yet; each one needs a machine with %s free", needed)

    def _get(self, actor: _Actor) -> tuple[Any, str, bool]:
        is_loading = actor.task is None
        try:
            result = self.ray.get(actor.future)
        except self.ray.exceptions.RayTaskError as error:
            if is_loading:
                self._leave_out(actor, str(error.cause))
            return None, f"{type(error.cause).__name__}: {error.cause}", False
        except self.ray.exceptions.RayError as error:
            return None, _last_sentence(error), True
        if is_loading:
            self._accept(actor, result)
        return result, "", False

    def _accept(self, actor: _Actor, described: dict) -> None:
        self._failed_starts = 0
        self.described = self.described or described
        for key in self.same:
            if described[key] != self.described[key]:
                values = f"{described[key]}, not {self.described[key]}"
                self._leave_out(actor, f"a worker on {described.get('host')} has another {key}: {values}")
                return

    def _leave_out(self, actor: _Actor, reason: str) -> None:
        _log.warning("a worker is left out: %s", reason)
        self._first_error = self._first_error or reason
        self._kill(actor)
        self._actors.remove(actor)

    def _start(self) -> None:
        actor = self.ray.remote(_Process).options(**self._options).remote(self.make_worker, os.getcwd())
        self._actors.append(_Actor(actor, actor.load.remote()))

    def _replace(self, actor: _Actor) -> None:
        """Start a new worker instead of one that died."""
        self._kill(actor)  # it may only be out of reach
        self._actors.remove(actor)
        self._failed_starts += 1
        if self._failed_starts > MAX_DEATHS * (len(self._actors) + 1):
            raise RuntimeError("the workers of Ray keep dying: see the logs of Ray")
        self._start()

    def _kill(self, actor: _Actor) -> None:
        with suppress(Exception):  # the connection to the cluster may be lost, and its processes with it
            self.ray.kill(actor.handle)


def _connect(ray: Any, workers: int | None) -> None:
    """Connect to the running cluster, or start one on this machine, with a CPU for each worker at least."""
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    local = {"num_cpus": max(workers or 1, os.cpu_count() or 1), "object_store_memory": OBJECT_STORE_BYTES}
    try:
        ray.init(**local, include_dashboard=False, **options)
    except ValueError:  # a running cluster takes no resources
        ray.init(**options)


def _resources(ray: Any, workers: int | None) -> tuple[dict, int]:
    """Return the options of an actor and the number of actors.

    On a cluster without GPUs the workers share the CPUs: Ray sets the number of threads of each to its CPUs.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = ([int(node.get(name, 0)) for node in nodes] for name in ("CPU", "GPU"))
    options = {"max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": "SPREAD"}
    if sum(gpus):
        return options | {"num_gpus": 1, "num_cpus": 1}, workers or sum(gpus)
    number = workers or sum(count > 0 for count in cpus) or 1
    share = max(1, min(sum(cpus) // number, min(filter(None, cpus), default=1)))
    return options | {"num_cpus": share}, number


def _last_sentence(error: BaseException) -> str:
    """Return the cause of death in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "exit" in line.lower()), (lines or [type(error).__name__])[-1])[:300]
