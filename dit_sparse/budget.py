"""How many blocks survive: scores ``[B, H, Qb, Kb]`` in, a boolean map of the same shape out.

A score of +inf is always kept. Every row keeps at least one block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels.planning.selection import select_best


def check_density(density: float) -> float:
    """The density itself, or ValueError: it is a fraction of the query-key pairs, above 0 and at most 1."""
    if not 0 < density <= 1:
        raise ValueError(
            f"density is the fraction of query-key pairs that is computed, above 0 and at most 1, not {density}"
        )
    return density


@dataclass(frozen=True)
class Top:
    """The same number of best blocks in every row: ``density`` of them, rounded, at least one."""

    density: float

    def __post_init__(self) -> None:
        check_density(self.density)

    def blocks_of(self, columns: int) -> int:
        """How many of so many blocks a row keeps."""
        return max(1, round(self.density * columns))

    def keep(self, scores: Tensor) -> Tensor:
        return select_best(scores, self.blocks_of(scores.shape[-1]))


@dataclass(frozen=True)
class Mass:
    """The fewest blocks whose softmax reaches ``share`` of each row; the block that crosses it is kept. But at least
    the fraction ``least`` of the blocks, and at most ``most``."""

    share: float
    least: float = 0.0
    most: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"a share of the mass lies above 0 and at most 1, not {self.share}")
        if not 0 <= self.least <= self.most <= 1:
            raise ValueError(f"least and most are fractions of the blocks, not {self.least} and {self.most}")

    def keep(self, scores: Tensor) -> Tensor:
        forced, blocks = scores.isposinf(), scores.shape[-1]
        mass = scores.masked_fill(forced, -torch.inf).softmax(-1).nan_to_num(0.0)
        keep = select_best(scores, self.share if self.share < 1 else math.inf, mass)
        if self == Mass(self.share):
            return keep
        found = (keep & ~forced).sum(-1, keepdim=True)
        found = found.clamp(max=max(1, round(self.most * blocks))).clamp(min=math.ceil(self.least * blocks))
        return select_best(scores, found, mass > 0)


@dataclass(frozen=True)
class Above:
    """Every block whose score exceeds ``threshold``, and the best one of each row."""

    threshold: float

    def keep(self, scores: Tensor) -> Tensor:
        return (scores > self.threshold) | (scores == scores.amax(-1, keepdim=True))


Budget = Top | Mass | Above


def top_tokens(scores: Tensor, sizes: Tensor, tokens: float) -> Tensor:
    """Of groups of any size the best of each row, up to so many tokens, to the nearest group; at least one.

    Args:
        scores: ``[B, H, Q, K]``; +inf is always kept.
        sizes: tokens of each key group, ``[B, H, 1, K]``. An empty group is kept only where its score is +inf.
    """
    return select_best(scores, tokens, sizes, to_nearest=True)
