"""ERNIE-Image: joint self-attention over image and text tokens, text last and padded at the end."""

from __future__ import annotations

from functools import cache

from dit_sparse.pipelines.family import Family, image_grid, pipeline_class

FAMILY = Family(
    name="ernie_image",
    transformers=("ErnieImageTransformer2DModel",),
    sites=r"layers\.\d+\.self_attention",
    grid=lambda config, arguments: image_grid(arguments, config["patch_size"]),
    text="after",
    images=True,
    pipelines=("ErnieImagePipeline",),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
