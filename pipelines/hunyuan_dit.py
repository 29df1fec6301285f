"""Hunyuan-DiT: self-attention over image tokens only."""

from __future__ import annotations

from functools import cache

from dit_sparse.pipelines.family import Family, image_grid, pipeline_class

FAMILY = Family(
    name="hunyuan_dit",
    transformers=("HunyuanDiT2DModel",),
    sites=r"blocks\.\d+\.attn1",
    grid=lambda config, arguments: image_grid(arguments, config["patch_size"]),
    images=True,
    pipelines=(
        "HunyuanDiTPipeline",
        "HunyuanDiTControlNetPipeline",
        "HunyuanDiTPAGPipeline",
    ),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
