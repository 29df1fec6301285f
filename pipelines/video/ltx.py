"""LTX-Video, LTX-2, and the refiner of SANA-WM: self-attention over video tokens only; the text enters through
cross-attention.

- The audio stream of LTX-2, its self-attention and the attention between both streams are short and stay dense.
- The refiner of SANA-WM is an LTX-2 that refines a few frames at a time. Their tokens are the queries; the keys also
  hold those of the first frames and of the frames refined before, so that all of them are one video whose last frames
  are the queries. SANA-WM's first stage has linear attention: enable ``pipe.refiner``, not ``pipe``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from dit_sparse.pipelines.family import Family, GridShape, pipeline_class

SAME = 1e-3  # angles of RoPE, in radians, that differ by less belong to the same position


def _grid_of_refiner(config: Mapping, arguments: Mapping) -> GridShape:
    """Return the grid of the keys. Latents arrive packed as ``[B, N, C]``, and their sizes are not among the arguments:
    a row ends where the first angle of RoPE along the height changes, and a frame where that along the frames does."""
    cos, sin = arguments["video_rotary_emb"]
    frame, row = (_first_change(_angles(cos, sin, config, axis)) for axis in (0, 1))
    width = min(row, frame)
    tokens = arguments["hidden_states"].shape[1] + _cached_tokens(arguments)
    return tokens // frame, frame // width, width


def _angles(cos: Tensor, sin: Tensor, config: Mapping, axis: int) -> Tensor:
    """Return the angle of every token ``[N]`` at the lowest frequency of an axis: frames, height or width. Columns of
    padding come first, then one column for each axis, which the interleaved form repeats."""
    columns = config["num_attention_heads"] * config["attention_head_dim"]
    if config["rope_type"] == "interleaved":  # [B, N, columns]
        head, column = None, columns % 6 + 2 * axis
    else:  # [B, H, N, columns / 2 / H]
        head, column = divmod(columns // 2 - columns // 6 * 3 + axis, cos.shape[-1])
    select = lambda x: (x[0] if head is None else x[0, head])[:, column].float()
    return torch.atan2(select(sin), select(cos))


def _first_change(angles: Tensor) -> int:
    """Return the number of the first token with another angle than token 0, or the number of tokens."""
    changed = (angles - angles[0]).abs() > SAME
    return int(changed.int().argmax()) if changed.any() else len(angles)


def _cached_tokens(arguments: Mapping) -> int:
    """Return the number of cached tokens before those of a call."""
    if "inject" not in (arguments.get("kv_cache_mode") or ""):
        return 0
    layer = arguments["kv_cache"].get(0)
    return sum(cached[0].shape[1] for cached in (layer.get_sink(), layer.get_history()) if cached is not None)


def _grid(config: Mapping, arguments: Mapping) -> GridShape:
    """Return the grid from the sizes among the arguments, because latents arrive packed as ``[B, N, C]``.

    The condition pipeline of LTX-Video passes ``video_coords [B, 3, N]`` instead; its keyframes are frames before the
    video.
    """
    if arguments.get("video_rotary_emb") is not None:
        return _grid_of_refiner(config, arguments)
    if (frames := arguments.get("num_frames")) is not None:
        return frames, arguments["height"], arguments["width"]
    coordinates = arguments["video_coords"]
    height, width = (len(coordinates[0, axis].unique()) for axis in (1, 2))
    return coordinates.shape[2] // (height * width), height, width


def _fps(pipeline: Mapping, transformer: Mapping) -> int:
    """Return 24 for LTX-2, 16 for the refiner of SANA-WM, 25 for LTX-Video."""
    if pipeline.get("_class_name") == "SanaWMLTX2Refiner":
        return 16
    return 24 if pipeline.get("_class_name", "").startswith("LTX2") else 25


FAMILY = Family(
    name="ltx",
    fps=_fps,
    transformers=(
        "LTXVideoTransformer3DModel",
        "LTX2VideoTransformer3DModel",
        "SanaWMLTX2RefinerTransformer3DModel",
    ),
    size_multiple=32,
    sites=r"transformer_blocks\.\d+\.attn1",
    grid=_grid,
    cached_keys=True,
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
        "SanaWMLTX2Refiner",
    ),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
