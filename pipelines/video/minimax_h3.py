"""MiniMax-H3: self-attention over one packed sequence of text, conditions, audio and video tokens, video last.

diffusers has modular pipelines of it only: enable their ``transformer`` component.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from torch import Tensor

from dit_sparse.pipelines.family import Family, GridShape, merged_grid, packed_shapes, pipeline_class


def _video_positions(arguments: Mapping) -> Tensor:
    """Return the position ids of the generated video: the last run of consecutive video tokens, ``[N, 3]``."""
    rows = arguments["video_indices"].cpu()
    gaps = (rows.diff() != 1).nonzero().flatten()
    return arguments["position_ids"][int(rows[gaps[-1] + 1 if len(gaps) else 0]) :]


def _grid(config: Mapping, arguments: Mapping) -> GridShape:
    return merged_grid(packed_shapes(_video_positions(arguments)))


def _references(config: Mapping, arguments: Mapping) -> tuple[int, int]:
    """Return the tokens of audio and conditions."""
    others = len(arguments["position_ids"]) - len(_video_positions(arguments))
    return others - len(arguments["text_indices"]), 0


FAMILY = Family(
    name="minimax_h3",
    fps=24,
    transformers=("MiniMaxH3Transformer3DModel",),
    sites=r"transformer_blocks\.\d+\.attn",
    grid=_grid,
    references=_references,
    text="before",
    reads=("position_ids", "video_indices", "text_indices"),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
