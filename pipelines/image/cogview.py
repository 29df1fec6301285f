"""CogView 3 Plus, CogView 4 and GLM-Image: joint self-attention over text and image tokens, text first.

An edit of GLM-Image attends to cached keys of its reference images, which are no queries, and stays dense.
"""

from __future__ import annotations

from functools import cache

from dit_sparse.pipelines.family import Family, image_grid, pipeline_class

FAMILY = Family(
    name="cogview",
    transformers=("CogView3PlusTransformer2DModel", "CogView4Transformer2DModel", "GlmImageTransformer2DModel"),
    sites=r"transformer_blocks\.\d+\.attn1",
    grid=lambda config, arguments: image_grid(arguments, config["patch_size"]),
    text="before",
    images=True,
    pipelines=("CogView3PlusPipeline", "CogView4Pipeline", "CogView4ControlPipeline", "GlmImagePipeline"),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
