"""Stable Diffusion 3 and 3.5: joint self-attention over image and text tokens, text last.

The second self-attention of SD 3.5 medium is over image tokens only.
"""

from __future__ import annotations

from functools import cache

from dit_sparse.pipelines.family import Family, image_grid, pipeline_class

FAMILY = Family(
    name="sd3",
    transformers=("SD3Transformer2DModel",),
    sites=r"transformer_blocks\.\d+\.attn2?",
    grid=lambda config, arguments: image_grid(arguments, config["patch_size"]),
    text="after",
    images=True,
    pipelines=(
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        "StableDiffusion3ControlNetPipeline",
        "StableDiffusion3ControlNetInpaintingPipeline",
        "StableDiffusion3PAGPipeline",
        "StableDiffusion3PAGImg2ImgPipeline",
    ),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
