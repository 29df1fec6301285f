"""Bundled models: their names, default settings and recipes. The weights are in `dit_sparse/assets`."""

from __future__ import annotations

from importlib.resources import files

BUNDLED = "shapes-wan"
BUNDLED_PROMPT = "a red circle moves right while a blue square moves up"
BUNDLED_FPS = 8
BUNDLED_CALL = {"num_inference_steps": 16, "guidance_scale": 4.0, "num_frames": 20, "height": 80, "width": 80}
SMALL_CALL = BUNDLED_CALL | {"num_inference_steps": 8, "num_frames": 7, "height": 64, "width": 64}


def model_source(model: str) -> str:
    """Return what ``from_pretrained`` takes: the folder of a bundled model, any other name unchanged."""
    return str(files("dit_sparse") / "assets" / model) if model == BUNDLED else model
