"""Error of one denoising step: the velocity that the scheduler gets, with every step started from the dense latents.

The error of the attention output or the lost attention mass does not predict how much a clip changes: guidance
amplifies differences between its branches, and layers have different influence. The error of the guided prediction
includes both effects. Because every step starts from the latents of the dense clip, errors do not accumulate, and a few
clips suffice to rank methods, where a comparison of whole clips needs dozens. It takes about as long as generating the
clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_sparse import SparseAttnProcessor
from dit_sparse.generation.generate import Progress, with_first_frame


@dataclass(frozen=True)
class Trajectory:
    """The steps of one clip.

    Attributes:
        predictions: the prediction that the scheduler got in each step, after guidance; on the CPU.
        latents: the latents after each step; on the CPU.
    """

    predictions: list[Tensor]
    latents: list[Tensor]


def record_trajectory(
    pipe: Any, prompt: str, seed: int, call: dict, progress: Progress | None = None, dense: Trajectory | None = None
) -> Trajectory:
    """Generate a clip without decoding it, and return its steps.

    Args:
        pipe: a diffusers pipeline whose scheduler's ``step`` takes the prediction first.
        prompt, seed, call, progress: as for `dit_sparse.generation.generate`.
        dense: the steps of another clip; each step starts from the latents of this clip.

    Raises:
        RuntimeError: the pipeline did not call the ``step`` of its scheduler once in each denoising step.
    """
    predictions: list[Tensor] = []
    latents: list[Tensor] = []

    def on_step_end(pipe: Any, step: int, timestep: Any, values: dict) -> dict:
        if len(predictions) != step + 1:
            raise RuntimeError(
                f"step {step} of {type(pipe).__name__} made {len(predictions) - step} predictions, not 1"
            )
        if dense is not None:
            values["latents"] = dense.latents[step].to(values["latents"])
        latents.append(values["latents"].cpu().clone())
        if progress:
            progress(step + 1, pipe.num_timesteps)
        return values

    pipe.set_progress_bar_config(disable=True)
    call = with_first_frame(pipe, prompt, seed, call)
    generator = torch.Generator().manual_seed(seed)
    with _recorded_predictions(pipe.scheduler, predictions.append):
        pipe(prompt=prompt, generator=generator, output_type="latent", callback_on_step_end=on_step_end, **call)
    return Trajectory(predictions, latents)


@contextmanager
def _recorded_predictions(scheduler: Any, record: Callable[[Tensor], None]) -> Iterator[None]:
    """Call ``record`` with the first argument of every ``scheduler.step``."""
    step = scheduler.step

    def recording_step(prediction: Tensor, *arguments: Any, **options: Any) -> Any:
        record(prediction.detach().cpu().clone())
        return step(prediction, *arguments, **options)

    own = vars(scheduler).get("step")
    scheduler.step = recording_step
    try:
        yield
    finally:
        if own is None:
            del scheduler.step
        else:
            scheduler.step = own


def step_errors(
    pipe: Any,
    processor: SparseAttnProcessor,
    prompt: str,
    seed: int,
    call: dict,
    dense: Trajectory,
    progress: Progress | None = None,
) -> dict:
    """Return the relative error of the guided prediction in every sparse step, and what the run computed.

    Args:
        pipe: a pipeline of `dit_sparse.prepare`.
        processor: the method and its schedule.
        prompt, seed, call, progress: as for `record_trajectory`.
        dense: the steps of the dense clip with the same prompt, seed and call.

    Returns:
        ``steps`` and ``errors``, |p - p_dense| / |p_dense| in each; ``density_achieved``, ``density_run``,
        ``tail_density``, ``attention_seconds`` and ``planning_seconds`` of the run.
    """
    pipe.set_attn_processor(processor)
    try:
        sparse = record_trajectory(pipe, prompt, seed, call, progress, dense)
        report = pipe.sparse_run.report()
    finally:
        pipe.set_attn_processor(None)
    first = processor.settings.schedule.first_sparse_step(len(dense.predictions))
    steps = range(first, len(dense.predictions))
    errors = [_relative_error(sparse.predictions[step], dense.predictions[step]) for step in steps]
    measured = ("density_achieved", "density_run", "tail_density", "attention_seconds", "planning_seconds")
    return {"steps": list(steps), "errors": errors} | {name: getattr(report, name) for name in measured}


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))
