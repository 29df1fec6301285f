"""Lumina 2: joint self-attention over text and image tokens, text first.

The refiners of text and noise stay dense. In a batch, each image starts where its own text ends.
"""

from __future__ import annotations

from functools import cache

from dit_sparse.pipelines.family import Family, image_grid, pipeline_class

FAMILY = Family(
    name="lumina2",
    transformers=("Lumina2Transformer2DModel",),
    sites=r"layers\.\d+\.attn",
    grid=lambda config, arguments: image_grid(arguments, config["patch_size"]),
    text="before",
    packed_text=True,
    mask="attention_mask",
    images=True,
    pipelines=("Lumina2Pipeline",),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
