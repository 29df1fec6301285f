"""Where the pipeline is: grid, step and branch of the running transformer call, found without touching the pipeline.

One hook on the transformer's forward sees the latents and the timestep; diffusers' cache context names the branch and
sometimes the step; the scheduler knows the step of a timestep. Nothing is counted by attention calls, so caches that
skip blocks do no harm.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from torch import nn

HOOK = "dit_sparse"
BOTH = "cond_uncond"  # the cache context of a batch with both branches of guidance, and without guidance
BRANCHES = {"cond", "uncond", "pred_cond", "pred_uncond", BOTH}


class StepTracker:
    """The clock of one run, shared by the transformers of a pipeline (Wan 2.2 has two that take turns)."""

    def __init__(
        self, timesteps: Callable[[], Any], guided: Callable[[], bool], steps: int | None, forget: Callable[[], None]
    ) -> None:
        """``timesteps()`` gives the scheduler's timesteps or None; ``guided()`` says whether the pipeline that batches
        both branches of guidance computes them now; ``forget()`` is called when a generation ends."""
        self._timesteps, self._guided, self._given_steps, self._forget = timesteps, guided, steps, forget
        self.step, self.steps = 0, steps
        self.branch, self.plan_group, self.both_branches = "", "", False  # as in Site
        self._latents = lambda: None  # those of the last call, while they live
        self._parts = 0  # of the video, as far as this step has come: windows, if there are several
        self.calls = 0
        self._first: float | None = None
        self._doubled = False
        self._last: float | None = None
        self._in_flight = False
        self._begin = 0  # where in the scheduler's timesteps the generation began: video-to-video leaves some out
        self._read_from: Any = None
        self._read: list[float] = []

    def begin_forward(self, timestep: torch.Tensor | float | None, latents: torch.Tensor, context: Any) -> None:
        """A transformer call begins. An earlier call that never left means that its generation failed."""
        if self._in_flight:
            self.reset()
        now, schedule = _scalar(timestep), self._schedule()
        step = self._step(now, schedule, context)
        if step < self.step:
            self.reset()
            step = self._step(now, schedule, context)
        repeated = self._last is not None and step == self.step and now == self._last
        self.calls = self.calls + 1 if repeated else 0
        if self._last is None:
            self._first, self._doubled = now, self._guided() and _doubled(latents)
        self._find_branch(getattr(context, "name", None), latents, repeated)
        self.step, self._last = step, now
        ahead = len(schedule) - self._begin
        self.steps = self._given_steps or getattr(context, "num_inference_steps", None) or ahead or None
        self._in_flight = True

    def end_forward(self) -> None:
        self._in_flight = False

    def reset(self) -> None:
        self.step, self.calls, self._last, self._in_flight, self._begin = 0, 0, None, False, 0
        self._forget()

    def _find_branch(self, name: str | None, latents: torch.Tensor, repeated: bool) -> None:
        """By the name of the cache context; without one, the other branch gets the very latents of the first."""
        if not repeated:
            self._parts = 0
        elif latents is not self._latents():
            self._parts += 1
        self._latents = weakref.ref(latents)
        self.both_branches = self._doubled and name == BOTH
        self.branch = name or f"call {self.calls}"
        self.plan_group = "" if name in BRANCHES else name or f"part {self._parts}"

    def _schedule(self) -> list[float]:
        """The scheduler's timesteps, read once a generation: reading waits for a GPU. New ones begin a generation."""
        timesteps = self._timesteps()
        if timesteps is not self._read_from:
            self.reset()
            self._read_from = timesteps
            self._read = [] if timesteps is None else [float(t) for t in torch.as_tensor(timesteps).tolist()]
        return self._read

    def _step(self, now: float | None, schedule: list[float], context: Any) -> int:
        given = getattr(context, "step_index", None)
        if given is not None:
            return int(given)
        if now is not None and (nearest := _nearest(now, schedule)) is not None:
            self._begin = nearest if self._last is None else self._begin
            return nearest - self._begin
        if self._last is None:
            return 0
        if now is None or now == self._last:
            return self.step
        return 0 if now == self._first else self.step + 1


class RootHook(ModelHook):
    """Tells the run where it is, before every call of one transformer. The state manager is there for diffusers to
    leave its cache context in."""

    _is_stateful = True

    def __init__(self, tracker: StepTracker, on_forward: Callable[[dict], None]) -> None:
        super().__init__()
        self.tracker, self.on_forward = tracker, on_forward
        self.contexts = StateManager(BaseState)

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        arguments = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        self.tracker.begin_forward(arguments.get("timestep"), arguments["hidden_states"], self.contexts._context)
        self.on_forward(arguments)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.tracker.end_forward()
        return output

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.contexts.reset()
        self.tracker.reset()
        return module


def register_root_hook(transformer: nn.Module, hook: RootHook) -> Callable[[], None]:
    """Put the hook on; returns the function that takes it off and leaves no trace.

    Raises:
        ValueError: another run is watching this transformer already.
    """
    fresh = not hasattr(transformer, "_diffusers_hook")
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    if registry.get_hook(HOOK) is not None:
        raise ValueError("this transformer is sparse already: disable() the earlier run first")
    own_forward = transformer.__dict__.get("forward")
    registry.register_hook(hook, HOOK)

    def undo() -> None:
        registry.remove_hook(HOOK, recurse=False)
        if not registry.hooks:
            if own_forward is None:
                transformer.__dict__.pop("forward", None)
            if fresh:
                transformer.__dict__.pop("_diffusers_hook", None)

    return undo


def _scalar(timestep: torch.Tensor | float | None) -> float | None:
    """The step's noise level. The largest entry: conditioned first frames carry zeros (Wan 2.2 5B)."""
    return float(timestep.max()) if isinstance(timestep, torch.Tensor) else timestep


def _doubled(latents: torch.Tensor) -> bool:
    """Whether a batch is the same latents twice over, as both branches of guidance get them."""
    half = len(latents) // 2
    return len(latents) % 2 == 0 and torch.equal(latents[:half], latents[half:])


def _nearest(now: float, schedule: list[float]) -> int | None:
    """The step whose timestep is nearest: half precision rounds what the scheduler gave. None: nothing is near, as
    where a pipeline rescales its timesteps."""
    if not schedule:
        return None
    step = min(range(len(schedule)), key=lambda i: abs(schedule[i] - now))
    near = abs(schedule[step] - now) <= 0.005 * max(abs(t) for t in schedule)
    return step if near else None
