"""Budgets: how many key blocks each query block keeps. A budget maps scores ``[B, H, Qb, Kb]`` to a boolean mask of
that shape.

Blocks are kept beyond their score in two ways. ``required`` blocks, such as the own block of each row, are kept first
and count in the budget. Blocks with a score of +inf are kept in addition to the budget. Every row keeps at least one
block. Blocks with text are not part of the scores: see `dit_sparse.density.VideoBlocks`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels.planning.selection import select_top
from .notation.settings import check_fields, within


@dataclass(frozen=True)
class Top:
    """Top-k: every row keeps the same number of best blocks.

    Attributes:
        density: fraction of the blocks that a row keeps, rounded, at least one block.
    """

    density: float = within("(0, 1]")

    def __post_init__(self) -> None:
        check_fields(self)

    def keep(self, scores: Tensor, required: Tensor | None = None) -> Tensor:
        """Return the mask of the blocks to keep."""
        unlimited = scores.isposinf()
        count = max(1, round(self.density * scores.shape[-1])) + unlimited.sum(-1, keepdim=True)
        return select_top(_first(scores, required), count)


@dataclass(frozen=True)
class Mass:
    """Top-p: every row keeps the fewest best blocks whose softmax adds up to ``top_p``.

    The softmax is over the blocks with finite scores, required ones included: `XAttention`, `ASA` and `SVG2` count all
    blocks, `Sparge` all but dissimilar ones, `PBS` all but those of the own segment.

    Attributes:
        top_p: attention mass to reach; the block that crosses it is kept.
        min_ratio: least fraction of the blocks that a row keeps, rounded down.
        max_ratio: greatest fraction of the blocks that a row keeps.
    """

    top_p: float = within("(0, 1]")
    min_ratio: float = within("[0, 1]", 0.0)
    max_ratio: float = within("[0, 1]", 1.0)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.min_ratio > self.max_ratio:
            raise ValueError(f"min_ratio must be at most max_ratio, got {self.min_ratio} and {self.max_ratio}")

    def keep(self, scores: Tensor, required: Tensor | None = None) -> Tensor:
        """Return the mask of the blocks to keep."""
        unlimited, blocks = scores.isposinf(), scores.shape[-1]
        mass = scores.masked_fill(unlimited, -torch.inf).softmax(-1).nan_to_num(0.0)
        scores = _first(scores, required)
        keep = select_top(scores, self.top_p if self.top_p < 1 else math.inf, mass)
        if self.min_ratio == 0 and self.max_ratio == 1:
            return keep
        count = (keep & ~unlimited).sum(-1, keepdim=True)
        count = count.clamp(max=max(1, round(self.max_ratio * blocks))).clamp(min=int(self.min_ratio * blocks))
        return select_top(scores, count, mass > 0)


@dataclass(frozen=True)
class Above:
    """Threshold: every row keeps the blocks whose score exceeds ``threshold``, and its best block."""

    threshold: float = within("[-inf, inf]")

    def __post_init__(self) -> None:
        check_fields(self)

    def keep(self, scores: Tensor, required: Tensor | None = None) -> Tensor:
        """Return the mask of the blocks to keep."""
        scores = _first(scores, required)
        return (scores > self.threshold) | (scores == scores.amax(-1, keepdim=True))


Budget = Top | Mass | Above


def _first(scores: Tensor, required: Tensor | None) -> Tensor:
    """Return the scores with +inf at the required blocks, so that these are kept first."""
    return scores if required is None else scores.masked_fill(required, torch.inf)
