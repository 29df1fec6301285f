"""Generalized neighborhood attention (GNA): windows of exact size along three axes, sliding, strided or dilated.

Source: A. Hassani et al., "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of
Light", arXiv:2504.16922, sec. 3. Take an axis of X tokens with window w, stride s and dilation d. Queries of the same
residue modulo d form a line of X' tokens, on which query a uses the window of the leader of its group of s:

    center c = clamp(min(s floor(a / s) + floor(s / 2), X' - 1), left, X' - 1 - right)
    keep the w tokens from c - left to c + right, with left = floor(w / 2) and right = ceil(w / 2) - 1

A pair of tokens is kept if all three axes keep it. s = 1 is neighborhood attention, s = w is blocked attention, and s
equal to the tile along all axes is sliding tile attention (P. Zhang et al., arXiv:2502.04507), see `sliding_tile`.

Planning: 3 (N / b)^2 comparisons of windows, once per grid.

Differs from the authors:
- Blocks are cut tile by tile, and a block pair is computed if any pair of its tokens is kept. The other pairs of such a
  block are computed, too; the authors mask them.
- Windows are fractions of the axes, so that one setting fits every grid.
- Tiles need not fill a block, and axes need not be multiples of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from ... import order
from ...grid import Grid
from ...notation.settings import within
from ...pattern import Pattern

Sizes = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Neighborhood(Pattern):
    """Windows along three axes.

    Attributes:
        window: w as a fraction of every axis.
        stride: s in frames, rows and columns; 0: the side of the tile.
        dilation: d in frames, rows and columns.
        tile: sides of the tiles that blocks are cut from; None: nearly cubic tiles that fill the block.
    """

    needs_raster: ClassVar[bool] = True
    knob: ClassVar[str] = "window"
    knob_range: ClassVar[tuple[float, float]] = (1e-3, 1.0)

    window: float = within("(0, 1]", 0.5)
    stride: tuple[int, int, int] = within("[0, 10000]", (1, 1, 1))
    dilation: tuple[int, int, int] = within("[1, 10000]", (1, 1, 1))
    tile: tuple[int, int, int] | None = within("[1, 256]", None)

    def order(self, grid: Grid, block: int) -> Tensor:
        return order.tiles(grid, *self._tile(grid, block))

    def keep(self, grid: Grid, block: int) -> Tensor:
        coordinates = grid.coordinates(self.order(grid, block))[:3]
        axes = [axis_to_blocks(*axis, block) for axis in zip(coordinates, self._axes(grid, block), strict=True)]
        return axes[0] & axes[1] & axes[2]

    def window_density(self, grid: Grid, block: int) -> float:
        """Return the fraction of the pairs of video tokens that lie in windows.

        Blocks compute more: the density of the plan. The paper's simulator compares the two to find settings without
        waste. The speedup of attention is at most 1 / density of the plan.
        """
        return float(torch.stack([keep.double().mean() for keep in self._axes(grid, block)]).prod())

    def _axes(self, grid: Grid, block: int) -> list[Tensor]:
        """Return which tokens of each axis attend to each other, bool ``[X, X]`` for frames, rows and columns."""
        sizes, tile = (grid.frames, grid.height, grid.width), self._tile(grid, block)
        axes = zip(sizes, self.stride, tile, self.dilation, strict=True)
        return [neighbors(size, ceil(self.window * size), s or side, d) for size, s, side, d in axes]

    def _tile(self, grid: Grid, block: int) -> Sizes:
        return cubic_tile(grid, block) if self.tile is None else self.tile


def cubic_tile(grid: Grid, block: int) -> Sizes:
    """Return the sides of nearly cubic tiles that fill a block: frames, rows and columns, powers of two."""
    side = [1, 1, 1]
    sizes = (grid.frames, grid.height, grid.width)
    while 2 * side[0] * side[1] * side[2] <= block:
        longest = max(range(3), key=lambda i: (sizes[i] > side[i], -side[i], i))
        side[longest] *= 2
    return tuple(side)


def sliding_tile(**settings) -> Neighborhood:
    """Return sliding tile attention: windows that move by whole tiles."""
    return Neighborhood(stride=(0, 0, 0), **settings)


def neighbors(size: int, window: int, stride: int = 1, dilation: int = 1) -> Tensor:
    """Return which tokens of an axis each of its tokens attends to, bool ``[X, X]``.

    Each row holds ``window`` tokens, or fewer if the line of one residue is shorter.
    """
    token = torch.arange(size)
    on_line, residue = token // dilation, token % dilation
    line = (size - residue + dilation - 1) // dilation
    window = line.clamp(max=window)
    left, right = window // 2, (window + 1) // 2 - 1
    leader = torch.minimum(on_line // stride * stride + stride // 2, line - 1)
    center = torch.maximum(torch.minimum(leader, line - 1 - right), left)
    near = (on_line >= (center - left)[:, None]) & (on_line <= (center + right)[:, None])
    return near & (residue == residue[:, None])


def axis_to_blocks(coordinate: Tensor, keep: Tensor, block: int) -> Tensor:
    """Return which block pairs hold a kept pair of coordinates of this axis, bool ``[Qb, Qb]``."""
    blocks = -(-len(coordinate) // block)
    holds = torch.zeros(blocks, len(keep))
    holds[torch.arange(len(coordinate)) // block, coordinate] = 1
    return holds @ keep.float() @ holds.T > 0
