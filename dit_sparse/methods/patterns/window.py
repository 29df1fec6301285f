"""3-D sliding-window attention: each block attends to the blocks near it in frames, rows and columns.

Source: P. Zhang et al., "Fast Video Generation with Sliding Tile Attention", arXiv:2502.04507, sec. 3; A. Hassani et
al., "Generalized Neighborhood Attention", arXiv:2504.16922, sec. 2.

With the bounding boxes of two blocks and their gap g along each axis of length X, a block pair is kept where

    g <= radius * X        along all three axes.

Planning: 3 (N / b)^2 comparisons of boxes, once per grid.

Differs from the authors: the window is a fraction of each axis instead of a table of supported shapes, and blocks are
cut along a Hilbert curve instead of fixed tiles, so that every grid works. Pairs are kept by the distance of their
boxes, so a kept block pair may hold token pairs outside the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ... import order
from ...grid import Blocks, Grid
from ...notation.settings import within
from ...pattern import Pattern


@dataclass(frozen=True, kw_only=True)
class Window(Pattern):
    """Window around each block along all three axes.

    Attributes:
        radius: half-width of the window as a fraction of each axis; 0.25 covers a quarter of the frames, rows and
            columns on either side.
    """

    knob: ClassVar[str] = "radius"
    knob_range: ClassVar[tuple[float, float]] = (1e-3, 1.0)

    radius: float = within("(0, 1]", 0.25)

    def order(self, grid: Grid, block: int) -> Tensor:
        return order.hilbert(grid)

    def keep(self, grid: Grid, block: int) -> Tensor:
        blocks = Blocks.from_grid(grid, block, self.order(grid, block))
        axes = zip((blocks.frame, blocks.row, blocks.column), grid.sides, strict=True)
        near = [span.gap() <= self.radius * length for span, length in axes]
        return near[0] & near[1] & near[2]
