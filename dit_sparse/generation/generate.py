"""Load a diffusers pipeline and generate one clip with it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..bundled import BUNDLED_CALL, BUNDLED_FPS, first_frame, is_image_model, model_call, model_source
from ..notation.reading import shorten_path
from ..output.files import to_uint8
from .checks import COUNTS, check_clip
from .loading import LoadOptions
from .model_config import check_model, failure_reason, frames_per_second

DEFAULT_FPS = 16
_log = logging.getLogger("dit_sparse")

Progress = Callable[[int, int], None]
Stage = Callable[[str], Progress]
LatentsObserver = Callable[[int, int, torch.Tensor], None]


@dataclass(frozen=True)
class Clip:
    """A generated video.

    Attributes:
        frames: ``[F, H, W, 3]``, uint8.
        seconds: time from the pipeline call to the end of the last denoising step, without decoding.
    """

    frames: NDArray
    seconds: float


def default_call(model: str, small: bool = False) -> dict:
    """Return the default arguments of the pipeline call.

    Args:
        model: the project's own models have defaults; for other models the dict is empty.
        small: a clip that takes seconds on a CPU, for commands that generate many.
    """
    return model_call(model, small)


def default_fps(model: str) -> int:
    """Return the default frames per second of a video file: those of the model, or 16 if they are unknown.

    The config of a model of the hub must be in the cache, as it is after `check_model`.
    """
    return BUNDLED_FPS if model_call(model) else frames_per_second(model) or DEFAULT_FPS


def load_pipeline(model: str, device: str | None = None, options: LoadOptions | None = None) -> Any:
    """Load a diffusers pipeline.

    Args:
        model: the bundled ``shapes-wan-i2v``, a local diffusers folder, or a name on the Hugging Face hub.
        device: default: ``cuda`` if there is a GPU, else ``cpu``.
        options: data type, offload and tiled decoding.

    Raises:
        ValueError: the model cannot be loaded, or no adapter supports its transformer.
    """
    from diffusers import DiffusionPipeline
    from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v

    own = bool(model_call(model))
    check_model(model)
    options = options or LoadOptions()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.torch_dtype(torch.float32 if own or device == "cpu" else torch.bfloat16)
    _log.info("loading %s", shorten_path(model))
    if own:  # the warning about num_frames does not apply: their autoencoder keeps every frame
        for module in (pipeline_wan, pipeline_wan_i2v):
            module.logger.addFilter(_is_not_frame_warning)
    try:
        with _no_loading_bars():
            pipe = DiffusionPipeline.from_pretrained(model_source(model), dtype=dtype)
    except Exception as error:
        raise ValueError(f"cannot load the model {shorten_path(model)}: {failure_reason(error)}") from error
    return options.place(pipe, device)


def generate(
    pipe: Any,
    prompt: str,
    seed: int,
    call: dict,
    progress: Progress | None = None,
    observer: LatentsObserver | None = None,
) -> Clip:
    """Generate one clip.

    Args:
        pipe: a diffusers pipeline.
        prompt, seed: prompt, and seed of the noise.
        call: further arguments of the pipeline call.
        progress: ``progress(done, steps)`` is called after every denoising step.
        observer: ``observer(step, steps, latents)`` is called after every denoising step.

    Raises:
        ValueError: an argument is invalid, or the frames contain NaN or infinity.
        RuntimeError: the latents contain NaN or infinity after a step.
    """
    check_clip(prompt, seed, call)
    step_ends: list[float] = []

    def on_step_end(pipe: Any, step: int, timestep: Any, values: dict) -> dict:
        if pipe.device.type == "cuda":
            torch.cuda.synchronize()
        step_ends.append(time.perf_counter())
        latents = values.get("latents")
        if latents is not None and not latents.isfinite().all():
            raise RuntimeError(f"the latents contain NaN or infinity after step {step + 1} of {pipe.num_timesteps}")
        if progress:
            progress(step + 1, pipe.num_timesteps)
        if observer:
            observer(step, pipe.num_timesteps, values["latents"])
        return values

    pipe.set_progress_bar_config(disable=True)
    call = with_first_frame(pipe, prompt, seed, call)
    generator = torch.Generator().manual_seed(seed)
    begin = time.perf_counter()
    frames = pipe(
        prompt=prompt, generator=generator, output_type="np", callback_on_step_end=on_step_end, **call
    ).frames[0]
    frames = np.asarray(frames)[: call.get("num_frames")]  # some autoencoders decode a multiple of several frames
    clip = Clip(to_uint8(frames), step_ends[-1] - begin)
    requested = tuple(call.get(name) or size for name, size in zip(COUNTS[1:], clip.frames.shape, strict=False))
    if requested != clip.frames.shape[:3]:
        sizes = " x ".join(map(str, clip.frames.shape[:3])), " x ".join(map(str, requested))
        _log.warning("the model generated %s (frames x height x width), not the requested %s", *sizes)
    return clip


def with_first_frame(pipe: Any, prompt: str, seed: int, call: dict) -> dict:
    """Return the call with the first frame that `shapes-wan-i2v` needs, drawn from prompt and seed.

    Calls of other models, and calls that have an image, are returned as they are.
    """
    if "image" in call or not is_image_model(pipe.config.get("_name_or_path")):
        return call
    call = BUNDLED_CALL | call
    return call | {"image": first_frame(prompt, seed, call)}


def _is_not_frame_warning(record: logging.LogRecord) -> bool:
    return "num_frames - 1" not in record.getMessage()


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """Hide the progress bars of reading weights from disk; downloads keep theirs."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in (diffusers_logging, transformers_logging):
            library.enable_progress_bar()
