"""HiDream-I1: joint self-attention over image and text tokens, text last.

The model pads images that are not square to its maximal length, and attends to this padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import prod

from dit_sparse.pipelines.family import Family, GridShape, image_grid, pipeline_class


def _grid(config: Mapping, arguments: Mapping) -> GridShape:
    """Return the grid of latents ``[B, C, H, W]``, or of packed ones from their sizes in tokens."""
    if arguments.get("hidden_states_masks") is None:
        return image_grid(arguments, config["patch_size"])
    height, width = arguments["img_sizes"][0]
    return 1, int(height), int(width)


def _references(config: Mapping, arguments: Mapping) -> tuple[int, int]:
    """Return the tokens that pad an image which is not square to the model's maximal length."""
    height, width = _grid(config, arguments)[1:]
    if arguments.get("hidden_states_masks") is not None:
        return 0, arguments["hidden_states"].shape[1] - height * width
    most = prod(config["max_resolution"]) // config["patch_size"] ** 2
    return 0, 0 if height == width else most - height * width


FAMILY = Family(
    name="hidream",
    transformers=("HiDreamImageTransformer2DModel",),
    sites=r"(double|single)_stream_blocks\.\d+\.block\.attn1",
    grid=_grid,
    references=_references,
    text="after",
    timestep="timesteps",
    images=True,
    pipelines=("HiDreamImagePipeline",),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
