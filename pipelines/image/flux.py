"""Flux 1, 2 and 3, Chroma, LongCat-Image and Ovis-Image: joint self-attention over text and image tokens, text first.

The reference images of Kontext and Flux 2 follow the image, as frames of a video if all have the image's size. The
first blocks of Flux 3 attend within the image, and stay dense if it has references.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch

from dit_sparse.pipelines.family import (
    Family,
    GridShape,
    merged_grid,
    merged_references,
    packed_shapes,
    pipeline_class,
)


def _shapes(config: Mapping, arguments: Mapping) -> list[GridShape]:
    """Return the sizes of the image and of its references, which Flux 3 passes by an argument of their own."""
    ids = [arguments["img_ids"], arguments.get("image_cond_ids")]
    return packed_shapes(torch.cat([part for part in ids if part is not None], -2))


FAMILY = Family(
    name="flux",
    transformers=(
        "FluxTransformer2DModel",
        "Flux2Transformer2DModel",
        "Flux3Transformer2DModel",
        "ChromaTransformer2DModel",
        "LongCatImageTransformer2DModel",
        "OvisImageTransformer2DModel",
    ),
    sites=r"((single_)?transformer_blocks|mode_blocks\.image)\.\d+\.attn",
    grid=lambda config, arguments: merged_grid(_shapes(config, arguments)),
    references=lambda config, arguments: merged_references(_shapes(config, arguments)),
    text="before",
    reads=("img_ids", "image_cond_ids"),
    images=True,
    pipelines=(
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxFillPipeline",
        "FluxControlPipeline",
        "FluxControlImg2ImgPipeline",
        "FluxControlInpaintPipeline",
        "FluxControlNetPipeline",
        "FluxControlNetImg2ImgPipeline",
        "FluxControlNetInpaintPipeline",
        "FluxKontextPipeline",
        "FluxKontextInpaintPipeline",
        "VisualClozePipeline",
        "VisualClozeGenerationPipeline",
        "Flux2Pipeline",
        "Flux2KleinPipeline",
        "Flux2KleinInpaintPipeline",
        "Flux2KleinKVPipeline",
        "ChromaPipeline",
        "ChromaImg2ImgPipeline",
        "ChromaInpaintPipeline",
        "LongCatImagePipeline",
        "LongCatImageEditPipeline",
        "OvisImagePipeline",
    ),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
