"""CogVideoX 1.0 and 1.5, and ConsisID: joint self-attention over text and video tokens, text first."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from dit_sparse.pipelines.family import Family, GridShape, pipeline_class


def _grid(config: Mapping, arguments: Mapping) -> GridShape:
    """Return the grid of latents ``[B, F, C, H, W]``. Version 1.5 patches frames too and pads the last patch."""
    _, frames, _, height, width = arguments["hidden_states"].shape
    patch, patch_frames = config["patch_size"], config.get("patch_size_t") or 1
    return -(-frames // patch_frames), height // patch, width // patch


FAMILY = Family(
    name="cogvideox",
    fps=8,
    transformers=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    size_multiple=16,
    sites=r"transformer_blocks\.\d+\.attn1",
    grid=_grid,
    text="before",
    pipelines=(
        "CogVideoXPipeline",
        "CogVideoXImageToVideoPipeline",
        "CogVideoXVideoToVideoPipeline",
        "CogVideoXFunControlPipeline",
        "ConsisIDPipeline",
    ),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
