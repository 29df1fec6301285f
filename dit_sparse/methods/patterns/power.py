"""PowerAttention: a window, a sink, and keys at power-of-two distances.

Source: L. Chen et al., "PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention",
arXiv:2503.03588, sec. 4. With the distance d of two blocks in a sequence, a block pair is kept where

    d < window,    or d is a power of two,    or the key block is the first one (sink).

A key at any distance is reached in as many layers as its distance has binary digits, so the receptive field doubles
with every layer while a row keeps O(log N) blocks.

Planning: (N / b)^2 comparisons of distances, once per grid.

Differs from the authors:
- Attention is bidirectional, so both signs of the distance are kept.
- Distances are counted in frames, so that a query attends to its own place in the frames at distances 1, 2, 4, ...
  ``by_frame=false`` counts blocks, as they do. On `shapes-wan` at density 0.25 the relative error of the output is
  0.183 with frames and 0.200 with blocks (random blocks: 0.232).
- A pair of tokens is kept if its distance is within ``width`` of a power of two, 0 in the paper, and a pair of blocks
  if it holds such a pair of tokens. ``density`` solves for the width; if even width 0 is too dense, for the window.
- Their window has 5 blocks. Here it has 1 unit: the own frame. All layers have the pattern; they also show a hybrid
  that keeps full attention in some layers, which is `masformer` here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...grid import Grid
from ...notation.settings import within
from ...pattern import Pattern
from ...plan import num_blocks


@dataclass(frozen=True, kw_only=True)
class Power(Pattern):
    """Power-of-two distances.

    Attributes:
        width: half-width of the diagonals at power-of-two distances, in frames or blocks.
        window: distances below it are kept, in frames or blocks.
        sink: whether every query attends to the first block of the video.
        by_frame: whether distances are counted in frames, else in blocks.
    """

    knob: ClassVar[str] = "width"
    knob_range: ClassVar[tuple[float, float]] = (1e-3, 1e5)
    narrowing: ClassVar[tuple[tuple[str, float], ...]] = (("window", 0.0),)

    width: float = within("[0, 1000000]", 0.0)
    window: float = within("[0, 1000000]", 1.0)
    sink: bool = True
    by_frame: bool = True

    @property
    def needs_raster(self) -> bool:
        return self.by_frame

    def keep(self, grid: Grid, block: int) -> Tensor:
        unit = grid.frame if self.by_frame else block
        start = torch.arange(num_blocks(grid.tokens, block)) * block
        distance = (start[:, None] - start).abs()
        keep = distance < self.window * unit
        power = unit
        while power < grid.tokens:
            # Two blocks hold pairs of tokens up to block - 1 nearer or farther than their starts.
            keep |= (distance - power).abs() <= self.width * unit + block - 1
            power *= 2
        if self.sink:
            keep[:, grid.before // block] = True
        return keep
