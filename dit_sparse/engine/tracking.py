"""Tracks the step and branch of the running transformer call without touching the pipeline.

One hook on the transformer's forward reads the latents and the timestep. diffusers' cache context names the branch and
sometimes the step; the scheduler gives the step of a timestep. Attention calls are not counted, because caches skip
blocks.
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
BOTH = "cond_uncond"  # cache context of a batch with both branches of guidance, and of a batch without guidance
BRANCHES = {"cond", "uncond", "pred_cond", "pred_uncond", BOTH}


class StepTracker:
    """Step and branch of a run, shared by the transformers of a pipeline (Wan 2.2 has two, for different steps).

    Args:
        timesteps: returns the scheduler's timesteps, or None.
        guided: returns whether a pipeline that batches both branches of guidance computes them.
        steps: number of steps, if the user gives it.
        end_generation: called when a generation ends, fails or restarts.

    Attributes:
        step, steps, branch, plan_group, both_branches: as in ``Site``.
    """

    def __init__(
        self,
        timesteps: Callable[[], Any],
        guided: Callable[[], bool],
        steps: int | None,
        end_generation: Callable[[], None],
    ) -> None:
        self._timesteps, self._guided, self._user_steps = timesteps, guided, steps
        self._end_generation = end_generation
        self.step, self.steps = 0, steps
        self.branch, self.plan_group, self.both_branches = "", "", False
        self._latents = lambda: None  # a weak reference to the latents of the last call
        self._part = 0  # of the video in this step: pipelines for long videos denoise it in windows
        self._call = 0  # transformer calls with this timestep so far
        self._first_timestep: float | None = None
        self._last_timestep: float | None = None
        self._batches_branches = False
        self._in_forward = False
        self._first_index = 0  # in the scheduler's timesteps: video to video skips the first ones
        self._scheduler_timesteps: Any = None
        self._schedule: list[float] = []

    @property
    def generating(self) -> bool:
        """Whether a generation has begun and was not reset."""
        return self._last_timestep is not None

    def begin_forward(self, timestep: torch.Tensor | float | None, latents: torch.Tensor, context: Any) -> None:
        """Update step and branch for a transformer call that begins.

        Args:
            timestep: the ``timestep`` argument of the call.
            latents: the ``hidden_states`` argument of the call.
            context: diffusers' cache context, or None.
        """
        if self._in_forward:  # the last call raised an error
            self.reset()
        timestep, schedule = _scalar(timestep), self._read_schedule()
        step = self._find_step(timestep, schedule, context)
        if step < self.step:  # a new generation
            self.reset()
            step = self._find_step(timestep, schedule, context)
        repeated = self._last_timestep is not None and step == self.step and timestep == self._last_timestep
        self._call = self._call + 1 if repeated else 0
        if self._last_timestep is None:
            self._first_timestep, self._batches_branches = timestep, self._guided() and _is_repeated(latents)
        self._find_branch(getattr(context, "name", None), latents, repeated)
        self.step, self._last_timestep = step, timestep
        remaining = len(schedule) - self._first_index
        self.steps = self._user_steps or getattr(context, "num_inference_steps", None) or remaining or None
        self._in_forward = True

    def end_forward(self) -> None:
        """Record that the transformer call ended without an error."""
        self._in_forward = False

    def reset(self) -> None:
        """Return to step 0 and end the generation."""
        self.step, self._call, self._last_timestep, self._in_forward, self._first_index = 0, 0, None, False, 0
        self._end_generation()

    def _find_branch(self, name: str | None, latents: torch.Tensor, repeated: bool) -> None:
        """Find the branch by the name of the cache context, or by the identity of the latents: both branches get the
        same tensor."""
        if not repeated:
            self._part = 0
        elif latents is not self._latents():
            self._part += 1
        self._latents = weakref.ref(latents)
        self.both_branches = self._batches_branches and name == BOTH
        self.branch = name or f"call {self._call}"
        self.plan_group = "" if name in BRANCHES else name or f"part {self._part}"

    def _read_schedule(self) -> list[float]:
        """Return the scheduler's timesteps, read once a generation because reading waits for the GPU. A new tensor
        starts a new generation."""
        timesteps = self._timesteps()
        if timesteps is not self._scheduler_timesteps:
            self.reset()
            self._scheduler_timesteps = timesteps
            self._schedule = [] if timesteps is None else [float(t) for t in torch.as_tensor(timesteps).tolist()]
        return self._schedule

    def _find_step(self, timestep: float | None, schedule: list[float], context: Any) -> int:
        """Return the step from the cache context, else from the schedule, else from changes of the timestep."""
        step = getattr(context, "step_index", None)
        if step is not None:
            return int(step)
        if timestep is not None and (index := _nearest_index(timestep, schedule)) is not None:
            self._first_index = index if self._last_timestep is None else self._first_index
            return index - self._first_index
        if self._last_timestep is None:
            return 0
        if timestep is None or timestep == self._last_timestep:
            return self.step
        return 0 if timestep == self._first_timestep else self.step + 1


class RootHook(ModelHook):
    """Updates a tracker before every call of a transformer. diffusers sets its cache context on the state manager.

    Args:
        tracker: shared by the transformers of a pipeline.
        on_forward: called with the bound arguments of every transformer call.
    """

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
    """Register a hook on a transformer.

    Returns:
        A function that removes the hook and every attribute that registering it added.

    Raises:
        ValueError: the transformer has a hook of another run.
    """
    had_registry = hasattr(transformer, "_diffusers_hook")
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    if registry.get_hook(HOOK) is not None:
        raise ValueError("this transformer is already sparse: call disable() on the earlier run first")
    own_forward = transformer.__dict__.get("forward")
    registry.register_hook(hook, HOOK)

    def undo() -> None:
        registry.remove_hook(HOOK, recurse=False)
        if not registry.hooks:
            if own_forward is None:
                transformer.__dict__.pop("forward", None)
            if not had_registry:
                transformer.__dict__.pop("_diffusers_hook", None)

    return undo


def _scalar(timestep: torch.Tensor | float | None) -> float | None:
    """Return the timestep as a number: the largest entry, because conditioned first frames have 0 (Wan 2.2 5B)."""
    return float(timestep.max()) if isinstance(timestep, torch.Tensor) else timestep


def _is_repeated(latents: torch.Tensor) -> bool:
    """Return whether both halves of a batch are equal, as both branches of guidance start from the same latents."""
    half = len(latents) // 2
    return len(latents) % 2 == 0 and torch.equal(latents[:half], latents[half:])


def _nearest_index(timestep: float, schedule: list[float]) -> int | None:
    """Return the index of the nearest timestep of a schedule, because half precision rounds timesteps, or None if none
    is near, as in pipelines that rescale them."""
    if not schedule:
        return None
    index = min(range(len(schedule)), key=lambda i: abs(schedule[i] - timestep))
    is_near = abs(schedule[index] - timestep) <= 0.005 * max(abs(t) for t in schedule)
    return index if is_near else None
