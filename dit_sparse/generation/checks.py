"""Checks of a clip's prompt, seed, size and frame rate, for all commands, batches and the page, before any work."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from ..bundled import first_frame_scene, is_image_model
from .model_config import COUNTS, check_size

MAX_PROMPT = 10_000  # characters
MAX_NUMBER = 100_000  # steps, frames or pixels
MAX_PIXELS = 2**34  # of all frames of a clip
MAX_FPS = 1000
MAX_SEED = 2**63 - 1


def check_prompt(prompt: Any) -> None:
    """Raise ValueError if a prompt is not a text of 1 to `MAX_PROMPT` characters."""
    _check_text("the prompt", prompt)
    if not prompt.strip():
        raise ValueError("the prompt is empty")


def check_seed(seed: Any) -> None:
    """Raise ValueError if a seed is not a whole number in [0, 2**63)."""
    if not _is_integer(seed) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"the seed must be in [0, 2**63), got {_shorten(seed)}")


def check_fps(fps: Any) -> None:
    """Raise ValueError if frames per second are not in (0, 1000]."""
    if isinstance(fps, bool) or not isinstance(fps, Real) or not 0 < fps <= MAX_FPS:
        raise ValueError(f"fps must be in (0, {MAX_FPS}], got {_shorten(fps)}")


def check_call(call: dict, min_steps: int = 1) -> None:
    """Raise ValueError if a number of a pipeline call is out of range.

    Args:
        call: arguments of the pipeline call. Arguments that have no limits are not checked.
        min_steps: least number of denoising steps.
    """
    for name in COUNTS:
        minimum = min_steps if name == "num_inference_steps" else 1
        value = call.get(name)
        if value is not None and not (_is_integer(value) and minimum <= value <= MAX_NUMBER):
            raise ValueError(f"{name} must be in [{minimum}, {MAX_NUMBER}], got {_shorten(value)}")
    if math.prod(call.get(name) or 1 for name in COUNTS[1:]) > MAX_PIXELS:
        raise ValueError(f"num_frames x height x width must be at most {MAX_PIXELS}: choose a smaller clip")
    for name, value in call.items():
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if name == "guidance_scale" and not is_number and value is not None:
            raise ValueError(f"guidance_scale must be a number, got {_shorten(value)}")
        if is_number and not abs(value) <= MAX_NUMBER:
            raise ValueError(f"{name[:40]} must be in [-{MAX_NUMBER}, {MAX_NUMBER}], got {_shorten(value)}")
    for name in ("negative_prompt", "prompt_2"):
        if call.get(name) is not None:
            _check_text(name, call[name])


def check_clip(prompt: Any, seed: Any, call: dict, fps: Any = 1, min_steps: int = 1, model: str | None = None) -> None:
    """Raise ValueError if the prompt, the seed, the call or the frame rate of a clip is invalid, or if the model, where
    it is given, cannot generate clips of that size or that prompt."""
    check_prompt(prompt)
    check_seed(seed)
    check_call(call, min_steps)
    if model is not None:
        check_size(model, call)
    check_fps(fps)
    if is_image_model(model):
        first_frame_scene(prompt, seed, call)


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a text, got {_shorten(text)}")
    if len(text) > MAX_PROMPT:
        raise ValueError(f"{name} must have at most {MAX_PROMPT} characters, got {len(text)}")
    if "\0" in text:
        raise ValueError(f"{name} contains a zero byte")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} contains characters that are not valid Unicode") from None


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _shorten(value: Any) -> str:
    try:
        return repr(value)[:40]
    except ValueError:  # an int of more than 4300 digits
        return "a number with thousands of digits"
