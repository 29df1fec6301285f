"""LTX-Video: latents arrive packed, so the grid is read from the call's arguments. Text enters by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from dit_sparse.pipelines.family import Family, Shape, stock_pipeline


def _grid(config: Mapping, arguments: Mapping) -> Shape:
    """The condition pipeline gives each token's place instead of the sizes; its keyframes stand before the video."""
    if (places := arguments.get("video_coords")) is None:
        return arguments["num_frames"], arguments["height"], arguments["width"]
    height, width = (len(places[0, axis].unique()) for axis in (1, 2))
    return places.shape[2] // (height * width), height, width


FAMILY = Family(
    name="ltx",
    transformers=("LTXVideoTransformer3DModel",),
    sites=r"transformer_blocks\.\d+\.attn1",
    grid=_grid,
    pipelines=("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline"),
)


@cache
def __getattr__(name: str) -> type:
    return stock_pipeline(__name__, FAMILY, name)
