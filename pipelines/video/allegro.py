"""Allegro: self-attention over video tokens only."""

from __future__ import annotations

from functools import cache

from dit_sparse.pipelines.family import Family, patch_grid, patch_size, pipeline_class

FAMILY = Family(
    name="allegro",
    fps=15,
    transformers=("AllegroTransformer3DModel",),
    sites=r"transformer_blocks\.\d+\.attn1",
    grid=lambda config, arguments: patch_grid(arguments, patch_size(config)),
    pipelines=("AllegroPipeline",),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
