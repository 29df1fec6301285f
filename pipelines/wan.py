"""Wan 2.1 and 2.2: text, image, VACE; one transformer or two. Text enters by cross-attention, which stays dense."""

from __future__ import annotations

from functools import cache

from dit_sparse.pipelines.family import Family, channels_first, stock_pipeline

FAMILY = Family(
    name="wan",
    transformers=("WanTransformer3DModel", "WanVACETransformer3DModel"),
    sites=r"(vace_)?blocks\.\d+\.attn1",
    grid=lambda config, arguments: channels_first(arguments, config["patch_size"]),
    pipelines=("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline", "WanVideoToVideoPipeline"),
)


@cache
def __getattr__(name: str) -> type:
    return stock_pipeline(__name__, FAMILY, name)
