"""JoyImage-Edit and JoyImage-Edit-Plus: joint self-attention over image and text tokens, text last.

The image and its references are the frames of a video if they have one size. Prompts of one batch whose references
differ in number are padded between image and text and stay dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from dit_sparse.pipelines.family import Family, GridShape, merged_grid, merged_references, pipeline_class


def _shapes(config: Mapping, arguments: Mapping) -> list[GridShape]:
    """Return the sizes of latents ``[B, C, F, H, W]``, of items ``[B, items, C, F, H, W]``, or those in a list."""
    if shapes := arguments.get("shape_list"):
        return [tuple(shape) for shape in shapes[0]]
    latents, patch = arguments["hidden_states"], config["patch_size"]
    frames, height, width = (size // step for size, step in zip(latents.shape[-3:], patch, strict=True))
    return [(frames, height, width)] * (latents.shape[1] if latents.ndim == 6 else 1)


FAMILY = Family(
    name="joyimage",
    transformers=("JoyImageEditTransformer3DModel", "JoyImageEditPlusTransformer3DModel"),
    sites=r"double_blocks\.\d+\.attn",
    grid=lambda config, arguments: merged_grid(_shapes(config, arguments)),
    references=lambda config, arguments: merged_references(_shapes(config, arguments)),
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
