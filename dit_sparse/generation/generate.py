"""Loading a pipeline and making one clip with it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..bundled import BUNDLED, BUNDLED_CALL, BUNDLED_FPS, SMALL_CALL, model_source
from ..output.files import to_uint8

USUAL_FPS = 16

Progress = Callable[[int, int], None]
Watch = Callable[[int, int, torch.Tensor], None]


@dataclass(frozen=True)
class Clip:
    """``frames [F, H, W, 3]`` uint8, and the seconds from the call to the end of the last denoising step."""

    frames: NDArray
    seconds: float


def usual_call(model: str, small: bool = False) -> dict:
    """Arguments of the pipeline where nobody says otherwise; ``small``: of a clip that the bundled model makes in some
    seconds, for commands that need many."""
    usual = SMALL_CALL if small else BUNDLED_CALL
    return dict(usual) if model == BUNDLED else {}


def usual_fps(model: str) -> int:
    """Frames a second where nobody says otherwise."""
    return BUNDLED_FPS if model == BUNDLED else USUAL_FPS


def load(model: str, device: str | None = None) -> Any:
    """A diffusers pipeline: the bundled ``shapes-wan``, a local folder or a name on the hub; on ``device``, or on a GPU
    if there is one.

    Raises:
        ValueError: it cannot be loaded; the message says why.
    """
    from diffusers import DiffusionPipeline
    from diffusers.pipelines.wan import pipeline_wan

    bundled = model == BUNDLED
    if not bundled and _looks_like_a_path(model) and not (Path(model) / "model_index.json").is_file():
        raise ValueError(f"{model} is no diffusers pipeline: it has no model_index.json")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if bundled or device == "cpu" else torch.bfloat16
    if bundled:  # its autoencoder keeps every frame, and the pipeline's advice on their number is about others
        pipeline_wan.logger.addFilter(_no_advice_on_frames)
    try:
        with _no_loading_bars():
            pipe = DiffusionPipeline.from_pretrained(model_source(model), dtype=dtype)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"cannot load the model {model}: {reason[0]}") from error
    return pipe.to(device)


def generate(
    pipe: Any, prompt: str, seed: int, call: dict, progress: Progress | None = None, watch: Watch | None = None
) -> Clip:
    """One clip from one seed; ``call`` holds further arguments of the pipeline. ``progress(done, steps)`` is told how
    far it is, and ``watch(step, steps, latents)`` sees the latents after every step."""
    finished: list[float] = []

    def step_ended(pipe: Any, step: int, timestep: Any, values: dict) -> dict:
        if pipe.device.type == "cuda":
            torch.cuda.synchronize()
        finished.append(time.perf_counter())
        if progress:
            progress(step + 1, pipe.num_timesteps)
        if watch:
            watch(step, pipe.num_timesteps, values["latents"])
        return values

    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    begin = time.perf_counter()
    frames = pipe(prompt, generator=generator, output_type="np", callback_on_step_end=step_ended, **call).frames[0]
    return Clip(to_uint8(np.asarray(frames)), finished[-1] - begin)


def _no_advice_on_frames(record: logging.LogRecord) -> bool:
    return "num_frames - 1" not in record.getMessage()


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """Downloads keep their bars; reading files from the disk needs none."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for library in (of_diffusers, of_transformers):
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in (of_diffusers, of_transformers):
            library.enable_progress_bar()


def _looks_like_a_path(model: str) -> bool:
    return Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") != 1
