"""Z-Image: joint self-attention over image and text tokens, text last.

Each part is padded to a multiple of 32 tokens. In the omni mode captions and reference images stand before the image,
and their vision features after it. The refiners of text and noise stay dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import prod

from torch import Tensor

from dit_sparse.pipelines.family import Family, GridShape, pipeline_class


def _size(image: Tensor, arguments: Mapping) -> GridShape:
    """Return the size of an image ``[C, F, H, W]`` in tokens."""
    frames, height, width = image.shape[1:]
    patch = arguments.get("patch_size", 2)
    return frames // arguments.get("f_patch_size", 1), height // patch, width // patch


def _grid(config: Mapping, arguments: Mapping) -> GridShape:
    """Return the grid of the latents ``x``: a list of images or, in the omni mode, lists whose last image is
    generated."""
    first = arguments["x"][0]
    return _size(first[-1] if isinstance(first, list) else first, arguments)


def _references(config: Mapping, arguments: Mapping) -> tuple[int, int]:
    """Return the captions and reference images of the omni mode, and the tokens that pad the image."""
    first, before = arguments["x"][0], 0
    if isinstance(first, list):
        references = [1 if image is None else prod(_size(image, arguments)) for image in first[:-1]]
        before = sum(map(_padded, [*map(len, arguments["cap_feats"][0]), *references]))
    tokens = prod(_grid(config, arguments))
    return before, _padded(tokens) - tokens


def _padded(tokens: int) -> int:
    return tokens + -tokens % 32


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
