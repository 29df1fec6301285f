"""A sliding 3-D window: each block attends to the blocks around it in frames, rows and columns.

Source: sliding-window attention carried to three axes: P. Zhang et al., "Fast Video Generation with Sliding Tile
Attention", arXiv:2502.04507, sec. 3; A. Hassani et al., "Generalized Neighborhood Attention", arXiv:2504.16922, sec. 2.
Differs from the authors: the window is a fraction of each axis instead of a table of supported shapes, tokens are cut
into blocks along a Hilbert curve instead of fixed tiles, so every grid works, and a block pair is kept when the boxes
around its two blocks come within the window of each other along every axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import order
from ..grid import Blocks, Grid
from ..method import Pattern


@dataclass(frozen=True, kw_only=True)
class Window(Pattern):
    """Keep what is near along all three axes.

    Attributes:
        size: half-width of the window as a fraction of each axis: ``.25`` reaches a quarter of the frames, rows and
            columns to either side.
    """

    knob: ClassVar[str] = "size"
    knob_range: ClassVar[tuple[float, float]] = (1e-3, 1.0)

    size: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.size <= 1:
            raise ValueError(f"size is a fraction of each axis, above 0 and at most 1, not {self.size}")

    def order(self, grid: Grid, block: int) -> Tensor:
        return order.hilbert(grid)

    def keep(self, grid: Grid, block: int) -> Tensor:
        at = Blocks.from_grid(grid, block, self.order(grid, block))
        axes = ((at.frame, grid.frames), (at.row, grid.height), (at.column, grid.width))
        near = [span.gap() <= self.size * length for span, length in axes]
        return near[0] & near[1] & near[2]
