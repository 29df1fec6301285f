"""Krea 2: joint self-attention over text and image tokens, text first and padded before the image."""

from __future__ import annotations

from functools import cache

from dit_sparse.pipelines.family import Family, merged_grid, packed_shapes, pipeline_class

FAMILY = Family(
    name="krea2",
    transformers=("Krea2Transformer2DModel",),
    sites=r"transformer_blocks\.\d+\.attn",
    grid=lambda config, arguments: merged_grid(
        packed_shapes(arguments["position_ids"][-arguments["hidden_states"].shape[1] :])
    ),
    text="before",
    reads=("position_ids",),
    images=True,
    pipelines=("Krea2Pipeline",),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
