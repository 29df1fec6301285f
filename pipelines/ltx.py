"""LTX-Video: self-attention over video tokens only; the text enters through cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from dit_sparse.pipelines.family import Family, GridShape, pipeline_class


def _grid(config: Mapping, arguments: Mapping) -> GridShape:
    """Return the grid from the sizes among the arguments, because latents arrive packed as ``[B, N, C]``.

    The condition pipeline passes ``video_coords [B, 3, N]`` instead; its keyframes are frames before the video.
    """
    if (coordinates := arguments.get("video_coords")) is None:
        return arguments["num_frames"], arguments["height"], arguments["width"]
    height, width = (len(coordinates[0, axis].unique()) for axis in (1, 2))
    return coordinates.shape[2] // (height * width), height, width


FAMILY = Family(
    name="ltx",
    fps=25,
    transformers=("LTXVideoTransformer3DModel",),
    size_multiple=32,
    sites=r"transformer_blocks\.\d+\.attn1",
    grid=_grid,
    pipelines=("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline", "LTXI2VLongMultiPromptPipeline"),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
