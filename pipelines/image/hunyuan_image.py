"""HunyuanImage 2.1 and its refiner: joint self-attention over image and text tokens, text last, padded at the end."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from dit_sparse.pipelines.family import Family, GridShape, pipeline_class


def _grid(config: Mapping, arguments: Mapping) -> GridShape:
    """Return the grid of latents ``[B, C, H, W]``, or ``[B, C, F, H, W]`` for the refiner."""
    sizes = arguments["hidden_states"].shape[2:]
    sizes = [size // patch for size, patch in zip(sizes, config["patch_size"], strict=True)]
    return (*[1] * (3 - len(sizes)), *sizes)


FAMILY = Family(
    name="hunyuan_image",
    transformers=("HunyuanImageTransformer2DModel",),
    sites=r"(single_)?transformer_blocks\.\d+\.attn",
    grid=_grid,
    text="after",
    images=True,
    pipelines=(
        "HunyuanImagePipeline",
        "HunyuanImageRefinerPipeline",
    ),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
