"""Qwen-Image: joint self-attention over text and image tokens, text first and padded before the image.

The images of an edit and the layers of Qwen-Image-Layered are the frames of a video if they have one size.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from dit_sparse.pipelines.family import Family, GridShape, merged_grid, merged_references, pipeline_class


def _shapes(arguments: Mapping) -> list[GridShape]:
    """Return the sizes of the first prompt's images in tokens."""
    shapes = arguments["img_shapes"][0]
    return shapes if isinstance(shapes, list) else [shapes]


FAMILY = Family(
    name="qwen_image",
    transformers=("QwenImageTransformer2DModel",),
    sites=r"transformer_blocks\.\d+\.attn",
    grid=lambda config, arguments: merged_grid(_shapes(arguments)),
    references=lambda config, arguments: merged_references(_shapes(arguments)),
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
