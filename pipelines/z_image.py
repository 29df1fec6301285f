"""Z-Image: joint self-attention over image and text tokens, text last.

Both parts are padded to a multiple of 32 tokens. The refiners of text and noise stay dense, and so does the
omni mode, whose images have noise levels of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import prod

from dit_sparse.pipelines.family import Family, GridShape, pipeline_class


def _grid(config: Mapping, arguments: Mapping) -> GridShape:
    """Return the grid of the latents ``x``, a list of ``[C, F, H, W]``; of the omni mode, that of the last image."""
    first, patch, patch_frames = arguments["x"][0], arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    image = first[-1] if isinstance(first, list) else first
    return image.shape[1] // patch_frames, image.shape[2] // patch, image.shape[3] // patch


def _references(config: Mapping, arguments: Mapping) -> tuple[int, int]:
    """Return the tokens that pad the image to a multiple of 32."""
    return 0, -prod(_grid(config, arguments)) % 32


FAMILY = Family(
    name="z_image",
    transformers=("ZImageTransformer2DModel",),
    sites=r"layers\.\d+\.attention",
    grid=_grid,
    references=_references,
    text="after",
    timestep="t",
    latents="t",  # as long as the batch; the latents are a list
    images=True,
    pipelines=(
        "ZImagePipeline",
        "ZImageImg2ImgPipeline",
        "ZImageInpaintPipeline",
        "ZImageControlNetPipeline",
        "ZImageControlNetInpaintPipeline",
        "ZImageOmniPipeline",
    ),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
