"""Budgets: how many key blocks each query block keeps. Scores ``[B, H, Qb, Kb]`` in, a boolean mask of that shape out.

A score of +inf is always kept, and every row keeps at least one block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels.planning.selection import select_top


def check_density(density: float) -> float:
    """Return the density. Raises ValueError unless it is in (0, 1]."""
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    return density


@dataclass(frozen=True)
class Top:
    """Top-k: every row keeps the same number of best blocks.

    Attributes:
        density: fraction of the blocks that a row keeps, rounded, at least one block.
    """

    density: float

    def __post_init__(self) -> None:
        check_density(self.density)

    def blocks_per_row(self, columns: int) -> int:
        """Return the number of blocks that a row of ``columns`` blocks keeps."""
        return max(1, round(self.density * columns))

    def keep(self, scores: Tensor) -> Tensor:
        """Return the mask of the blocks to keep."""
        return select_top(scores, self.blocks_per_row(scores.shape[-1]))


@dataclass(frozen=True)
class Mass:
    """Top-p: every row keeps the fewest best blocks whose softmax adds up to ``top_p``.

    Attributes:
        top_p: attention mass to reach; the block that crosses it is kept.
        min_ratio, max_ratio: least and greatest fraction of the blocks that a row keeps.
    """

    top_p: float
    min_ratio: float = 0.0
    max_ratio: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p, the attention mass to keep, must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_ratio <= self.max_ratio <= 1:
            raise ValueError(
                "min_ratio and max_ratio, fractions of the blocks, must satisfy 0 <= min_ratio <= max_ratio <= 1, "
                f"got {self.min_ratio} and {self.max_ratio}"
            )

    def keep(self, scores: Tensor) -> Tensor:
        """Return the mask of the blocks to keep. Mass and bounds count only blocks with finite scores."""
        forced, blocks = scores.isposinf(), scores.shape[-1]
        mass = scores.masked_fill(forced, -torch.inf).softmax(-1).nan_to_num(0.0)
        keep = select_top(scores, self.top_p if self.top_p < 1 else math.inf, mass)
        if self == Mass(self.top_p):
            return keep
        count = (keep & ~forced).sum(-1, keepdim=True)
        count = count.clamp(max=max(1, round(self.max_ratio * blocks))).clamp(min=math.ceil(self.min_ratio * blocks))
        return select_top(scores, count, mass > 0)


@dataclass(frozen=True)
class Above:
    """Threshold: every row keeps the blocks whose score exceeds ``threshold``, and its best block."""

    threshold: float

    def keep(self, scores: Tensor) -> Tensor:
        """Return the mask of the blocks to keep."""
        return (scores > self.threshold) | (scores == scores.amax(-1, keepdim=True))


Budget = Top | Mass | Above


def top_tokens(scores: Tensor, sizes: Tensor, tokens: float) -> Tensor:
    """Return the mask of the best key groups of each row that hold ``tokens`` tokens, to the nearest group.

    Args:
        scores: ``[B, H, Q, K]``; +inf is always kept. Every row keeps at least one group.
        sizes: tokens of each key group, ``[B, H, 1, K]``. An empty group is kept only if its score is +inf.
        tokens: tokens to keep in a row.
    """
    return select_top(scores, tokens, sizes, to_nearest=True)
