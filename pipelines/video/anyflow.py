"""AnyFlow, the bidirectional model: self-attention over video tokens only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from dit_sparse.pipelines.family import Family, GridShape, pipeline_class


def _grid(config: Mapping, arguments: Mapping) -> GridShape:
    """Return the grid of latents ``[B, F, C, H, W]``."""
    _, frames, _, height, width = arguments["hidden_states"].shape
    patch = config["patch_size"]
    return frames // patch[0], height // patch[1], width // patch[2]


FAMILY = Family(
    name="anyflow",
    fps=16,
    transformers=("AnyFlowTransformer3DModel",),
    sites=r"blocks\.\d+\.attn1",
    grid=_grid,
    pipelines=("AnyFlowPipeline",),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
