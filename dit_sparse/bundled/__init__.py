"""The project's own small models: their names, default settings and recipe.

`shapes-wan-i2v`, an image-to-video model, is part of the package; its weights are in `dit_sparse/assets`, and
`first_frame` draws the image that it starts from. Folders of the repository, in `eval/models`: `shapes-wan`, an older
text-to-video model, and `shapes-3d`, a model of coloured solids on sparse voxels.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from .shapes_wan.scenes import Scene, Size

BUNDLED = "shapes-wan-i2v"
BUNDLED_PROMPT = "a red circle moves right while a blue square moves up"
BUNDLED_FPS = 8
BUNDLED_CALL = {"num_inference_steps": 16, "guidance_scale": 2.0, "num_frames": 13, "height": 96, "width": 96}
SMALL_CALL = BUNDLED_CALL | {"num_inference_steps": 8, "num_frames": 7, "height": 64, "width": 64}

TEXT_MODEL = "shapes-wan"  # the name of its folder
TEXT_MODEL_CALL = BUNDLED_CALL | {"guidance_scale": 4.0, "num_frames": 20, "height": 80, "width": 80}


SOLID_MODEL = "shapes-3d"  # the name of its folder
SOLID_PROMPT = "a striped red torus on a blue box"
SOLID_CALL = {"resolution": 44, "num_inference_steps": 12, "guidance_scale": 1.0}


def solid_model_folder() -> Path:
    """Return the folder of `shapes-3d` in a checkout.

    Raises:
        ValueError: the package is not in a checkout.
    """
    folder = Path(__file__).parents[2] / "eval" / "models" / SOLID_MODEL
    if not folder.is_dir():
        raise ValueError(
            f"{SOLID_MODEL} is not part of the package: clone the repository and give its folder eval/models/"
            f"{SOLID_MODEL} by --model"
        )
    return folder


def model_source(model: str) -> str:
    """Return what ``from_pretrained`` takes: the folder of the bundled model, any other name unchanged."""
    return str(files("dit_sparse") / "assets" / model) if model == BUNDLED else model


def bundled_prompts() -> list[str]:
    """Return the 60 prompts that commands use by default; no pair of shapes in them occurred in training."""
    return (files("dit_sparse") / "assets" / "prompts.txt").read_text().splitlines()


def is_image_model(model: str | None) -> bool:
    """Return whether a model is `shapes-wan-i2v`, by its name or that of its folder: it needs a first frame."""
    return Path(str(model)).name == BUNDLED


def model_call(model: str, small: bool = False) -> dict:
    """Return the default arguments of the pipeline call of the project's own models; empty for all others.

    Args:
        small: a clip that takes seconds on a CPU.
    """
    calls = {BUNDLED: BUNDLED_CALL, TEXT_MODEL: TEXT_MODEL_CALL}
    call = calls.get(Path(model).name, {})
    return SMALL_CALL | {"guidance_scale": call["guidance_scale"]} if call and small else dict(call)


def first_frame(prompt: str, seed: int = 0, call: dict = BUNDLED_CALL) -> Image.Image:
    """Return the first frame of a clip of `shapes-wan-i2v`, drawn from the prompt and the seed.

    Args:
        prompt: such as ``"a red circle moves right while a blue square moves up"``.
        call: arguments of the pipeline's call; its size is used.

    Raises:
        ValueError: the prompt names no shapes that the model knows, or not where they move.
    """
    from .shapes_wan.first_frame import draw

    return draw(first_frame_scene(prompt, seed, call), _clip_size(call), seed)


def first_frame_scene(prompt: str, seed: int, call: dict) -> Scene:
    """Return the scene of a prompt. Arguments and errors as in `first_frame`."""
    from .shapes_wan.first_frame import prompt_scene

    return prompt_scene(prompt, _clip_size(call), seed)


def _clip_size(call: dict) -> Size:
    from .shapes_wan.scenes import Size

    frames, height, width = (call.get(name) or BUNDLED_CALL[name] for name in ("num_frames", "height", "width"))
    return Size(frames + 1, height, width)  # the pipeline generates one frame more
