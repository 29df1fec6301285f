"""Z-Image: joint self-attention over image and text tokens, text last.

Both parts are padded to a multiple of 32 tokens. The padding of the image counts as text. The refiners of text and
noise stay dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from dit_sparse.pipelines.family import Family, GridShape, merged_grid, pipeline_class


def _grid(config: Mapping, arguments: Mapping) -> GridShape:
    """Return the grid of the latents ``x``, a list of ``[C, F, H, W]``, or of lists of such images."""
    first, patch = arguments["x"][0], arguments.get("patch_size", 2)
    images = [image for image in (first if isinstance(first, list) else [first]) if image is not None]
    return merged_grid([(image.shape[1], image.shape[2] // patch, image.shape[3] // patch) for image in images])


FAMILY = Family(
    name="z_image",
    transformers=("ZImageTransformer2DModel",),
    sites=r"layers\.\d+\.attention",
    grid=_grid,
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
