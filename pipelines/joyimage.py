"""JoyImage-Edit and JoyImage-Edit-Plus: joint self-attention over image and text tokens, text last.

The image and its references are the frames of a video if they have one size.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from dit_sparse.pipelines.family import Family, GridShape, merged_grid, pipeline_class


def _grid(config: Mapping, arguments: Mapping) -> GridShape:
    """Return the grid of latents ``[B, C, F, H, W]``, of items ``[B, items, C, F, H, W]``, or of a list of sizes."""
    if shapes := arguments.get("shape_list"):
        return merged_grid(shapes[0])
    latents, patch = arguments["hidden_states"], config["patch_size"]
    frames, height, width = (size // step for size, step in zip(latents.shape[-3:], patch, strict=True))
    return frames * (latents.shape[1] if latents.ndim == 6 else 1), height, width


FAMILY = Family(
    name="joyimage",
    transformers=("JoyImageEditTransformer3DModel", "JoyImageEditPlusTransformer3DModel"),
    sites=r"double_blocks\.\d+\.attn",
    grid=_grid,
    text="after",
    images=True,
    pipelines=(
        "JoyImageEditPipeline",
        "JoyImageEditPlusPipeline",
    ),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
