"""LTX-Video: latents arrive packed, so the grid is read from the call's arguments. Text enters by cross-attention."""

from __future__ import annotations

from functools import cache

from dit_sparse.pipelines.family import Family, stock_pipeline

FAMILY = Family(
    name="ltx",
    transformers=("LTXVideoTransformer3DModel",),
    sites=r"transformer_blocks\.\d+\.attn1",
    grid=lambda config, arguments: (arguments["num_frames"], arguments["height"], arguments["width"]),
    pipelines=("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline"),
)


@cache
def __getattr__(name: str) -> type:
    return stock_pipeline(__name__, FAMILY, name)
