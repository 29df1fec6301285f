"""MobileViG (SVGA): each place attends to every K-th place on its row, on its column and in time.

Source: M. Munir, W. Avery, R. Marculescu, "MobileViG: Graph-Based Sparse Attention for Mobile Vision Applications",
arXiv:2307.00395, sec. 3.1 (sparse vision graph attention). Place (y, x) of a feature map is connected to

    (y, x + m K)  and  (y + m K, x)        for all whole m, with K = 2,

a fixed graph that needs no search for neighbours.

Planning: (N / b)^2 comparisons of places, once per grid.

Differs from the authors:
- Their graph joins features by a max-relative graph convolution; here its edges are the pairs of attention.
- The frame axis is a third line: (f + m K, y, x).
- A place is a tile of the tokens that fill a block, 4x4x4 for 64 tokens. Strides of single tokens would keep every
  block on a line.
- ``density`` widens the lines: a place within ``width`` of a line and of its steps is kept, too, up to the whole video.
  If even width 0 is too dense, K grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ... import order
from ...grid import Grid
from ...notation.settings import within
from ...pattern import Pattern
from .neighborhood import axis_to_blocks, cubic_tile


@dataclass(frozen=True, kw_only=True)
class SVGA(Pattern):
    """Strided lines along the three axes.

    Attributes:
        width: half-width of the lines and of their steps, as a fraction of the tiles along each axis.
        stride: K, in tiles.
    """

    needs_raster: ClassVar[bool] = True
    knob: ClassVar[str] = "width"
    knob_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    narrowing: ClassVar[tuple[tuple[str, float], ...]] = (("stride", 10_000),)

    width: float = within("[0, 1]", 0.0)
    stride: int = within("[1, 10000]", 2)

    def order(self, grid: Grid, block: int) -> Tensor:
        return order.tiles(grid, *cubic_tile(grid, block))

    def keep(self, grid: Grid, block: int) -> Tensor:
        coordinates, near, strided = grid.coordinates(self.order(grid, block))[:3], [], []
        sizes, sides = (grid.frames, grid.height, grid.width), cubic_tile(grid, block)
        for coordinate, size, side in zip(coordinates, sizes, sides, strict=True):
            tile = torch.arange(size) // side
            distance = (tile[:, None] - tile).abs()
            to_step = torch.minimum(distance % self.stride, -distance % self.stride)
            width = self.width * (int(tile[-1]) + 1)
            near.append(axis_to_blocks(coordinate, distance <= width, block))
            strided.append(axis_to_blocks(coordinate, to_step <= width, block))
        in_time = strided[0] & near[1] & near[2]
        on_column = near[0] & strided[1] & near[2]
        on_row = near[0] & near[1] & strided[2]
        return in_time | on_column | on_row
