"""Generalized neighborhood attention: windows of exactly w tokens an axis, sliding, strided or dilated.

Source: A. Hassani et al., "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of
Light", arXiv:2504.16922, sec. 3. Along an axis of X tokens with window w, stride s and dilation d, queries of one
residue modulo d form a line of X' tokens on which query a follows the leader of its group of s,

    c = clamp(min(s floor(a / s) + floor(s / 2), X' - 1), left, X' - 1 - right)

with left = floor(w / 2) and right = ceil(w / 2) - 1, and keeps the w tokens from c - left to c + right. A pair is kept
where all three axes keep it. s = 1 is neighborhood attention, s = w blocked attention; whole tiles for all three is
sliding tile attention (P. Zhang et al., arXiv:2502.04507), the preset `sliding_tile`.

Tokens are cut into blocks tile by tile, and a block pair is visited when any pair of its tokens is kept; what a visited
block holds besides is computed too (the authors mask it). Differs from the authors: windows are fractions of the axes,
so one setting serves every grid; a tile that does not fill the block, and axes that tiles do not divide, are allowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from .. import order
from ..grid import Grid
from ..method import Pattern

Three = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Neighborhood(Pattern):
    """Windows along three axes.

    Attributes:
        window: w as a fraction of every axis.
        stride: s in frames, rows and columns; 0: the tile's side.
        dilation: d in frames, rows and columns.
        tile: sides of the boxes that blocks are cut from; None: near-cubes that fill the block.
    """

    knob: ClassVar[str] = "window"
    knob_range: ClassVar[tuple[float, float]] = (1e-3, 1.0)

    window: float = 0.5
    stride: Three = (1, 1, 1)
    dilation: Three = (1, 1, 1)
    tile: Three | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("stride", "dilation", "tile"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists
        if not 0 < self.window <= 1:
            raise ValueError(f"window is a fraction of each axis, above 0 and at most 1, not {self.window}")
        if min(self.stride) < 0 or min(self.dilation) < 1 or min(self.tile or (1,)) < 1:
            given = f"{self.stride}, {self.dilation}, {self.tile}"
            raise ValueError(f"stride is at least 0, dilation and tile at least 1, not {given}")

    def order(self, grid: Grid, block: int) -> Tensor:
        return order.tiles(grid, *self._tile(grid, block))

    def keep(self, grid: Grid, block: int) -> Tensor:
        coordinates = grid.coordinates(self.order(grid, block))[:3]
        seen = [_touched(*pair, block) for pair in zip(coordinates, self._axes(grid, block), strict=True)]
        return seen[0] & seen[1] & seen[2]

    def wanted(self, grid: Grid, block: int) -> float:
        """Share of the pairs of video tokens that lie in windows. Blocks compute more of them, by the density of the
        plan; the paper's simulator counts the same two to find settings without waste. The speed-up is at most one over
        the density."""
        return float(torch.stack([kept.double().mean() for kept in self._axes(grid, block)]).prod())

    def _axes(self, grid: Grid, block: int) -> list[Tensor]:
        """Which tokens of each axis see each other, bool ``[X, X]`` for frames, rows and columns."""
        sizes, tile = (grid.frames, grid.height, grid.width), self._tile(grid, block)
        along = zip(sizes, self.stride, tile, self.dilation, strict=True)
        return [neighbors(size, ceil(self.window * size), s or side, d) for size, s, side, d in along]

    def _tile(self, grid: Grid, block: int) -> Three:
        if self.tile is not None:
            return self.tile
        side = [1, 1, 1]
        sizes = (grid.frames, grid.height, grid.width)
        while 2 * side[0] * side[1] * side[2] <= block:
            longest = max(range(3), key=lambda i: (sizes[i] > side[i], -side[i], i))
            side[longest] *= 2
        return tuple(side)


def sliding_tile(**settings) -> Neighborhood:
    """Sliding tile attention, for Python: windows move by whole tiles."""
    return Neighborhood(stride=(0, 0, 0), **settings)


def neighbors(size: int, window: int, stride: int = 1, dilation: int = 1) -> Tensor:
    """Which of the tokens of an axis each of them keeps, bool ``[X, X]``: exactly ``window``, fewer where a line of one
    residue is shorter than that."""
    place = torch.arange(size)
    on_line, residue = place // dilation, place % dilation
    line = (size - residue + dilation - 1) // dilation
    window = line.clamp(max=window)
    left, right = window // 2, (window + 1) // 2 - 1
    leader = torch.minimum(on_line // stride * stride + stride // 2, line - 1)
    center = torch.maximum(torch.minimum(leader, line - 1 - right), left)
    near = (on_line >= (center - left)[:, None]) & (on_line <= (center + right)[:, None])
    return near & (residue == residue[:, None])


def _touched(place: Tensor, kept: Tensor, block: int) -> Tensor:
    """Which block pairs hold a kept pair of places of this axis, bool ``[Qb, Qb]``."""
    blocks = -(-len(place) // block)
    holds = torch.zeros(blocks, len(kept))
    holds[torch.arange(len(place)) // block, place] = 1
    return holds @ kept.float() @ holds.T > 0
