"""LTX-Video and LTX-2: self-attention over video tokens only; the text enters through cross-attention.

The audio stream of LTX-2, its self-attention and the attention between both streams are short and stay dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from dit_sparse.pipelines.family import Family, GridShape, pipeline_class


def _grid(config: Mapping, arguments: Mapping) -> GridShape:
    """Return the grid from the sizes among the arguments, because latents arrive packed as ``[B, N, C]``.

    The condition pipeline of LTX-Video passes ``video_coords [B, 3, N]`` instead; its keyframes are frames before the
    video.
    """
    if (frames := arguments.get("num_frames")) is not None:
        return frames, arguments["height"], arguments["width"]
    coordinates = arguments["video_coords"]
    height, width = (len(coordinates[0, axis].unique()) for axis in (1, 2))
    return coordinates.shape[2] // (height * width), height, width


def _fps(pipeline: Mapping, transformer: Mapping) -> int:
    """Return 24 for LTX-2, 25 for LTX-Video."""
    return 24 if pipeline.get("_class_name", "").startswith("LTX2") else 25


FAMILY = Family(
    name="ltx",
    fps=_fps,
    transformers=("LTXVideoTransformer3DModel", "LTX2VideoTransformer3DModel"),
    size_multiple=32,
    sites=r"transformer_blocks\.\d+\.attn1",
    grid=_grid,
    pipelines=(
        "LTXPipeline",
        "LTXImageToVideoPipeline",
        "LTXConditionPipeline",
        "LTXI2VLongMultiPromptPipeline",
        "LTX2Pipeline",
        "LTX2ImageToVideoPipeline",
        "LTX2ConditionPipeline",
        "LTX2InContextPipeline",
        "LTX2DFRPipeline",
        "LTX2DFRTemporalRefinePipeline",
        "LTX2HDRPipeline",
    ),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
