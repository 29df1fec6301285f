"""Qwen-Image: joint self-attention over text and image tokens, text first and padded before the image.

The images of an edit and the layers of Qwen-Image-Layered are the frames of a video if they have one size.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from dit_sparse.pipelines.family import Family, GridShape, merged_grid, pipeline_class


def _grid(config: Mapping, arguments: Mapping) -> GridShape:
    """Return the grid of the first prompt, whose images are listed with their sizes in tokens."""
    shapes = arguments["img_shapes"][0]
    return merged_grid(shapes if isinstance(shapes, list) else [shapes])


FAMILY = Family(
    name="qwen_image",
    transformers=("QwenImageTransformer2DModel",),
    sites=r"transformer_blocks\.\d+\.attn",
    grid=_grid,
    text="before",
    mask="encoder_hidden_states_mask",
    images=True,
    pipelines=(
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
        "QwenImageEditInpaintPipeline",
        "QwenImageLayeredPipeline",
        "QwenImageControlNetPipeline",
        "QwenImageControlNetInpaintPipeline",
    ),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
