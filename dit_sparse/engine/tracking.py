"""Track the step and branch of the running transformer call without touching the pipeline.

diffusers' cache context names the branch and sometimes the step; the scheduler counts its steps; the timestep of the
call is used if neither is available. Attention calls are never counted, because caches skip blocks.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch

log = logging.getLogger("dit_sparse")

BOTH = "cond_uncond"  # cache context of a batch with both branches of guidance, and of a batch without guidance
BRANCHES = {"cond", "uncond", "pred_cond", "pred_uncond", BOTH}
STALLED_CALLS = 64  # forward calls in one step after which the step is reported not to advance


class StepTracker:
    """Step and branch of a generation, shared by the transformers of a pipeline (Wan 2.2 has two, for different steps).

    Args:
        scheduler: returns the pipeline's scheduler, or None.
        guided: returns whether a pipeline that batches both branches of guidance computes them now.
        steps: number of steps, if the user gives it.
        end_generation: called when a generation ends, fails or restarts.
        default_steps: number of steps if neither the user nor a scheduler gives it.

    Attributes:
        step, steps, branch, plan_group, both_branches: as in ``Site``.
        in_forward: whether a forward call of a transformer is running, or may be, where it is compiled.
    """

    def __init__(
        self,
        scheduler: Callable[[], Any],
        guided: Callable[[], bool],
        steps: int | None,
        end_generation: Callable[[], None],
        default_steps: int | None = None,
    ) -> None:
        self._default_steps = default_steps
        self._scheduler, self._guided, self._user_steps = scheduler, guided, steps
        self._end_generation = end_generation
        self.step, self.steps = 0, steps
        self.branch, self.plan_group, self.both_branches = "", "", False
        self.in_forward = False
        self._in_eager_forward = False
        self._latents = lambda: None  # a weak reference to the latents of the last call
        self._part = 0  # index of the window in this step, for pipelines that denoise long videos in windows
        self._call = 0  # transformer calls with this timestep so far
        self._first_timestep: float | None = None
        self._last_timestep: float | None = None
        self._first_index = 0  # index of the first timestep in the schedule: video-to-video skips the first ones
        self._scheduler_timesteps: Any = None
        self._schedule: list[float] = []
        self._generating = False

    @property
    def generating(self) -> bool:
        """Whether a generation has begun and was not reset."""
        return self._generating

    def begin_forward(
        self, timestep: torch.Tensor | float | None, latents: torch.Tensor, context: Any, compiled: bool = False
    ) -> None:
        """Update step and branch for a transformer call that begins.

        Args:
            timestep: the timestep argument of the call.
            latents: the latents argument of the call, ``[B, ...]``.
            context: diffusers' cache context, or None.
            compiled: whether the call is compiled as a whole, so that its end is not reported.
        """
        if self._in_eager_forward:  # the last call raised an error
            self.reset()
        timestep, schedule = _largest(timestep), self._read_schedule()
        step = self._find_step(timestep, schedule, context)
        if step < self.step:  # a new generation
            self.reset()
            step = self._find_step(timestep, schedule, context)
        repeated = self._generating and step == self.step and timestep == self._last_timestep
        self._call = self._call + 1 if repeated else 0
        if not self._generating:
            self._first_timestep, self._generating = timestep, True
        self._find_branch(getattr(context, "name", None), latents, repeated)
        self.step, self._last_timestep = step, timestep
        remaining = len(schedule) - self._first_index
        known = self._user_steps or getattr(context, "num_inference_steps", None) or remaining
        self.steps = known or self._default_steps
        self.in_forward, self._in_eager_forward = True, not compiled
        if self._call == STALLED_CALLS:
            log.warning(
                "the denoising step has not advanced for %d forward calls (timestep %s): sparse steps may never begin; "
                "use dense_steps=0 if the steps cannot be distinguished",
                STALLED_CALLS,
                timestep,
            )

    def end_forward(self) -> None:
        """Record that the transformer call ended without an error."""
        self.in_forward = self._in_eager_forward = False

    def reset(self) -> None:
        """Return to step 0 and end the generation."""
        self.step, self._call, self._last_timestep, self._first_index = 0, 0, None, 0
        self._generating = self.in_forward = self._in_eager_forward = False
        self._end_generation()

    def _find_branch(self, name: str | None, latents: torch.Tensor, repeated: bool) -> None:
        """Find the branch by the name of the cache context, or by the identity of the latents: both branches get the
        same tensor. Whether a batch holds both branches can change within a generation."""
        if not repeated:
            self._part = 0
        elif latents is not self._latents():
            self._part += 1
        self._latents = weakref.ref(latents)
        self.both_branches = name == BOTH and self._guided() and _is_repeated(latents)
        self.branch = name or f"call {self._call}"
        self.plan_group = "" if name in BRANCHES else name or f"part {self._part}"

    def _read_schedule(self) -> list[float]:
        """Return the scheduler's timesteps, read once per generation because reading synchronizes with the GPU. A new
        tensor starts a new generation."""
        timesteps = getattr(self._scheduler(), "timesteps", None)
        if timesteps is not self._scheduler_timesteps:
            self.reset()
            self._scheduler_timesteps = timesteps
            self._schedule = [] if timesteps is None else [float(t) for t in torch.as_tensor(timesteps).tolist()]
        return self._schedule

    def _find_step(self, timestep: float | None, schedule: list[float], context: Any) -> int:
        """Return the step from the cache context, else from the scheduler's own counter, which distinguishes the
        evaluations of a second-order scheduler, else from the position of the timestep in the schedule, else from its
        changes."""
        step = getattr(context, "step_index", None)
        if step is not None:
            return int(step)
        counter = getattr(self._scheduler(), "step_index", None)
        if counter is not None and self._generating:
            return int(counter) - self._first_index
        first = self._first_timestep if self._generating else timestep
        is_scaled = first is not None and bool(schedule) and first <= 1 < schedule[0]  # the model gets t / 1000
        index = None if timestep is None or is_scaled else _nearest_index(timestep, schedule)
        if not self._generating:
            self._first_index = index if index is not None else getattr(self._scheduler(), "begin_index", None) or 0
            return 0
        if index is not None:
            return index - self._first_index
        if timestep is None or timestep == self._last_timestep:
            return self.step
        return 0 if timestep == self._first_timestep else self.step + 1


def _largest(timestep: torch.Tensor | float | None) -> float | None:
    """Return the timestep as a number, the largest of several: conditioned first frames have 0 (Wan 2.2 5B)."""
    return float(timestep.max()) if isinstance(timestep, torch.Tensor) else timestep


def _is_repeated(latents: torch.Tensor) -> bool:
    """Return whether both halves of a batch are equal, as both branches of guidance start from the same latents."""
    half = len(latents) // 2
    return len(latents) % 2 == 0 and torch.equal(latents[:half], latents[half:])


def _nearest_index(timestep: float, schedule: list[float]) -> int | None:
    """Return the index of the nearest timestep of a schedule, or None if none is close, as in pipelines that rescale
    them. Half precision rounds a timestep by at most 0.4 %."""
    if not schedule:
        return None
    index = min(range(len(schedule)), key=lambda i: abs(schedule[i] - timestep))
    nearest = schedule[index]
    return index if abs(nearest - timestep) <= 0.005 * max(abs(nearest), abs(timestep)) else None
