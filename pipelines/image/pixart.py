"""PixArt-alpha, PixArt-sigma and Hunyuan-DiT: self-attention over image tokens only."""

from __future__ import annotations

from functools import cache

from dit_sparse.pipelines.family import Family, image_grid, pipeline_class

FAMILY = Family(
    name="pixart",
    transformers=("PixArtTransformer2DModel", "HunyuanDiT2DModel"),
    sites=r"(transformer_)?blocks\.\d+\.attn1",
    grid=lambda config, arguments: image_grid(arguments, config["patch_size"]),
    images=True,
    pipelines=(
        "PixArtAlphaPipeline",
        "PixArtSigmaPipeline",
        "PixArtSigmaPAGPipeline",
        "HunyuanDiTPipeline",
        "HunyuanDiTControlNetPipeline",
        "HunyuanDiTPAGPipeline",
    ),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
