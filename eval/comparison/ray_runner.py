"""Generation of the clips of a comparison by the workers of a Ray cluster, which share the folder of the clips.

A worker generates all rows of a prompt and seed, one after the other, so that the rows of a sample are timed on the
same device. All workers have the same kind of device and the same versions: the results of different ones are merged by
`dit_sparse.eval.comparison.merge`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from dit_sparse import Schedule
from dit_sparse.generation.generate import Progress
from dit_sparse.generation.ray_batch import check_shared, describe_process, shared_token
from dit_sparse.generation.ray_pool import RayPool, check_engine
from dit_sparse.output.environment import conditions

from .clip_spec import ClipSpec, Sample
from .runner import ClipRunner, Task


def runner_class(engine: str, workers: int | None = None) -> Callable[..., ClipRunner]:
    """Return what makes the runner of an engine, ``local`` or ``ray``. Raises ValueError as `check_engine`."""
    check_engine(engine, workers)
    return ClipRunner if engine == "local" else partial(RayClipRunner, workers=workers)


class ClipWorker:
    """Runs tasks of a comparison with a pipeline that it loads once.

    Args:
        make_runner: makes a runner with the settings of the comparison.
        folder, token: the absolute folder of the clips, and a file in it, which shows that it is shared.

    Raises:
        ValueError: the folder is not shared, or the model cannot be loaded.
    """

    def __init__(self, make_runner: Callable[[], ClipRunner], folder: Path, token: str) -> None:
        check_shared(folder, token)
        self.runner = make_runner()
        _ = self.runner.pipe

    def describe(self) -> dict:
        return describe_process() | self.runner.shared_key

    def run(self, task: Task) -> Any:
        return task(self.runner, lambda done, total: None)


class RayClipRunner(ClipRunner):
    """Generates the clips of a comparison on a Ray cluster; no model is loaded in this process.

    Args:
        workers: number of workers, as for `RayPool`, at most one for each prompt and seed.

    The other arguments are those of `ClipRunner`.

    Raises:
        ValueError: Ray is not installed.
    """

    progress_unit = "clips"

    def __init__(
        self,
        model: str,
        prompts: Sequence[str],
        seeds: Sequence[int],
        call: dict,
        folder: Path,
        schedule: Schedule,
        executor: str = "auto",
        block: int | None = None,
        workers: int | None = None,
    ) -> None:
        super().__init__(model, prompts, seeds, call, folder, schedule, executor, block)
        folder = folder.absolute()
        make_runner = partial(ClipRunner, model, prompts, seeds, call, folder, schedule, executor, block)
        same = ("device", "versions", "sources", "weights")
        with ExitStack() as opened:
            make_worker = partial(ClipWorker, make_runner, folder, opened.enter_context(shared_token(folder)))
            self.pool = RayPool(make_worker, workers, same, at_most=len(self.samples))
            opened.callback(self.pool.close)
            self._opened = opened.pop_all()

    @cached_property
    def shared_key(self) -> dict:
        """The part of the key that all clips share, as the workers have it."""
        described = self.pool.wait_for_first()
        return {name: described[name] for name in ("model", "weights", "sources", "versions", "device")}

    def conditions(self) -> dict:
        return conditions() | {name: self.shared_key[name] for name in ("device", "versions")}

    def generate_missing(self, specs: Sequence[ClipSpec], progress: Progress) -> dict[str, str]:
        """Generate the clips that are not stored, and return the error of every row that failed, by its name.

        Args:
            specs: the rows.
            progress: counts clips.

        Raises:
            RuntimeError: dense attention failed, several workers died on a sample, or the workers store other clips.
        """
        missing = self._missing(specs)
        tasks = [partial(_generate_sample, sample=sample, specs=rows) for sample, rows in missing.items()]
        total, before = sum(map(len, missing.values())), self._count_files()
        report = lambda: progress(min(total, self._count_files() - before), total)
        errors: dict[str, str] = {}
        for failed in self._run(tasks, report):
            errors |= {name: error for name, error in failed.items() if name not in errors}
        progress(*((total, total) if total else (1, 1)))
        for sample, rows in self._missing([spec for spec in specs if spec.name not in errors]).items():
            place = f"{rows[0].name} for {sample.prompt[:60]!r}"
            raise RuntimeError(
                f"no worker has stored {place}: the files of dit-sparse must be the same on all machines"
            )
        return errors

    def attention_errors(self, specs: Sequence[ClipSpec], progress: Progress) -> dict[str, float]:
        """Return the relative error of each method's attention output, as `ClipRunner.attention_errors`."""
        return self.run_tasks([partial(_measure_errors, specs=specs)], progress)[0]

    def run_tasks(self, tasks: Sequence[Task], progress: Progress) -> list:
        """Run tasks in the workers and return their results in the order of the tasks."""
        results = self._run(tasks, lambda: None, progress)
        progress(len(tasks), len(tasks))
        return results

    def close(self) -> None:
        self._opened.close()

    def _run(self, tasks: Sequence[Task], on_poll: Callable[[], None], progress: Progress | None = None) -> list:
        results: dict[int, Any] = {}

        def keep(number: int, result: Any) -> None:
            results[number] = result
            if progress:
                progress(len(results), len(tasks))

        self.pool.run(tasks, keep, _raise, on_poll)
        return [results[number] for number in range(len(tasks))]

    def _missing(self, specs: Sequence[ClipSpec]) -> dict[Sample, list[ClipSpec]]:
        """Return the rows without a stored clip by sample."""
        by_sample = {sample: [spec for spec in specs if not self._is_stored(spec, sample)] for sample in self.samples}
        return {sample: rows for sample, rows in by_sample.items() if rows}

    def _is_stored(self, spec: ClipSpec, sample: Sample) -> bool:
        return self.store.get(*self.key(spec, sample)) is not None

    def _count_files(self) -> int:
        return sum(1 for _ in self.store.folder.glob("[!.]*.npz"))


def _generate_sample(
    runner: ClipRunner, progress: Progress, sample: Sample, specs: Sequence[ClipSpec]
) -> dict[str, str]:
    return runner.generate_missing(specs, progress, [sample])


def _measure_errors(runner: ClipRunner, progress: Progress, specs: Sequence[ClipSpec]) -> dict[str, float]:
    return runner.attention_errors(specs, progress)


def _raise(number: int, reason: str) -> None:
    raise RuntimeError(reason)
