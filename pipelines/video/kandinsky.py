"""Kandinsky 5 and 6: self-attention over video tokens only; the text enters through cross-attention.

Latents have their channels last. Text blocks and the audio blocks of Kandinsky 6 stay dense, and so do models of
Kandinsky 5 that use NABLA, a sparse attention of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from dit_sparse.pipelines.family import Family, GridShape, pipeline_class


def _grid(config: Mapping, arguments: Mapping) -> GridShape:
    """Return the grid of latents ``[B, F, H, W, C]``."""
    sizes = arguments["hidden_states"].shape[1:4]
    return tuple(size // patch for size, patch in zip(sizes, config["patch_size"], strict=True))


FAMILY = Family(
    name="kandinsky",
    fps=24,
    transformers=("Kandinsky5Transformer3DModel", "Kandinsky6Transformer3DModel"),
    sites=r"visual_transformer_blocks\.\d+\.(video_dec_block\.)?self_attention",
    grid=_grid,
    pipelines=(
        "Kandinsky5T2VPipeline",
        "Kandinsky5I2VPipeline",
        "Kandinsky5T2IPipeline",
        "Kandinsky5I2IPipeline",
        "Kandinsky6TI2VAPipeline",
    ),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
