"""Mochi: joint self-attention over video and text tokens, text last.

The model drops padded text and attends one batch item at a time, so calls of one step can differ in length.
"""

from __future__ import annotations

from functools import cache

from dit_sparse.pipelines.family import Family, patch_grid, patch_size, pipeline_class

FAMILY = Family(
    name="mochi",
    fps=30,
    transformers=("MochiTransformer3DModel",),
    size_multiple=16,
    sites=r"transformer_blocks\.\d+\.attn1",
    grid=lambda config, arguments: patch_grid(arguments, patch_size(config)),
    text="after",
    pipelines=("MochiPipeline",),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
