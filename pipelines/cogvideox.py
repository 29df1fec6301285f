"""CogVideoX 1.0 and 1.5: text and video attend jointly, text before the video."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from dit_sparse.pipelines.family import Family, Shape, stock_pipeline


def _grid(config: Mapping, arguments: Mapping) -> Shape:
    """Latents ``[B, F, C, H, W]``; version 1.5 also joins frames, and pads them to a whole patch."""
    _, frames, _, height, width = arguments["hidden_states"].shape
    side, depth = config["patch_size"], config["patch_size_t"] or 1
    return -(-frames // depth), height // side, width // side


FAMILY = Family(
    name="cogvideox",
    transformers=("CogVideoXTransformer3DModel",),
    sites=r"transformer_blocks\.\d+\.attn1",
    grid=_grid,
    text="before",
    pipelines=("CogVideoXPipeline", "CogVideoXImageToVideoPipeline", "CogVideoXVideoToVideoPipeline"),
)


@cache
def __getattr__(name: str) -> type:
    return stock_pipeline(__name__, FAMILY, name)
