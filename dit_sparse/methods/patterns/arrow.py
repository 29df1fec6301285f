"""Arrow attention (SeNER): a band, a global row and column, and a plus-shaped window.

Source: Y. Chen, F. Zhang, J. Tang, "Small Language Model Makes an Effective Long Text Extractor", arXiv:2502.07286.
Their encoder keeps a band around the diagonal and one global token, [CLS], that attends to all tokens and that all
tokens attend to: the mask has the shape of an arrow. Their decoder works on a grid of text spans, where a cell attends
to the cells near it on its row and on its column: a plus. For video tokens i and j with gaps g along the axes:

    band      |i - j| <= band * N
    global    i or j is text or belongs to the first ``frames`` frames
    plus      g = 0 along two axes, and g <= plus * X along the third one of length X

Planning: (N / b)^2 comparisons of places, once per grid.

Differs from the authors:
- They use the arrow and the plus in different parts of the model; here one mask has both. The plus has a third axis,
  time. Gaps are those of the bounding boxes of row-major blocks.
- Text is global, as in all methods here. [CLS] has no other counterpart, so a small part of the first frame takes its
  place. On `shapes-wan` at density 0.25 the relative error of the output is 0.20 with one block of it and 0.24
  with the whole frame, whose row and column are 0.09 of all pairs (random blocks: 0.23).
- LogN scaling of the queries of [CLS] is left out: it changes the scale of the scores, which belongs to the model; a
  method here decides only which pairs are computed.
- ``density`` solves for the band; if even the narrowest one is too dense, for the plus, then for the global part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...grid import Blocks, Grid
from ...notation.settings import within
from ...pattern import Pattern
from ...plan import num_blocks


@dataclass(frozen=True, kw_only=True)
class Arrow(Pattern):
    """Band, global row and column, and plus.

    Attributes:
        band: half-width of the band as a fraction of the sequence.
        plus: length of each arm of the plus as a fraction of its axis; 0: no plus.
        frames: part of the video that is global, in frames; 0: text alone.
    """

    needs_raster: ClassVar[bool] = True
    knob: ClassVar[str] = "band"
    knob_range: ClassVar[tuple[float, float]] = (1e-4, 1.0)
    narrowing: ClassVar[tuple[tuple[str, float], ...]] = (("plus", 0.0), ("frames", 0.0))

    band: float = within("(0, 1]", 0.05)
    plus: float = within("[0, 1]", 0.25)
    frames: float = within("[0, 1000000]", 0.05)

    def keep(self, grid: Grid, block: int) -> Tensor:
        start = torch.arange(num_blocks(grid.tokens, block)) * block
        band = (start[:, None] - start).abs() <= self.band * grid.tokens
        is_global = (start + block > grid.before) & (start < grid.before + self.frames * grid.frame)
        is_global = is_global & (self.frames > 0)
        return band | is_global[:, None] | is_global | self._plus(grid, block)

    def _plus(self, grid: Grid, block: int) -> Tensor:
        """Return the pairs of blocks on one line, bool ``[Qb, Qb]``."""
        blocks = Blocks.from_grid(grid, block)
        frame, row, column = (span.gap() for span in (blocks.frame, blocks.row, blocks.column))
        in_time = (row + column == 0) & (frame <= self.plus * grid.frames)
        on_column = (frame + column == 0) & (row <= self.plus * grid.height)
        on_row = (frame + row == 0) & (column <= self.plus * grid.width)
        return (in_time | on_column | on_row) & (self.plus > 0)
