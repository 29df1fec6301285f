"""Radial attention: a spatial window that halves as the temporal distance doubles.

Source: X. Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation",
arXiv:2506.19852, sec. 4. Attention between token k of frame i and token l of frame j decays exponentially in both
|i - j| and |k - l|, so a window of width ~ 2^-log2|i-j| loses little, and O(n log n) pairs remain.

The rule is that of the authors' released masks, which gave the published results, not the paper's eq. 4. With s tokens
per frame, P the power of two above s, d = |i - j|, g the bit length of d (0, 1, 2, 2, 3, 3, 3, 3, ...):

    window     keep |k - l| <= w, with w = s if d <= dense_distance, else max(decay * P / 2^g, min_width * block)
    thinning   where L = P / 2^g < block, keep a frame pair only if d is a multiple of block / L
    sink       every query keeps frame 0
    blocks     keep a block pair if more than 0.6 of its non-empty columns are kept in more than 1/3 of its rows

Planning: (N / b)^2 comparisons of runs of tokens, once per grid.

Differs from the authors:
- They draw each pair of frames as an s x s mask and require s to be a multiple of 128. Here the same rule is evaluated
  in closed form for the runs of tokens that blocks cut from frames, so any s and any text before or after the video
  work, and no N x N tensor is needed.
- Dense distance, sink and block size are settings instead of depending on the name of the model.
- Thinning starts below the block size instead of below 128.
- ``density`` solves for ``decay``. If even the narrowest windows exceed it, as on small grids where a frame is a few
  blocks, windows get narrower than ``min_width``, as in eq. 4, and then near frames are dropped. Below
  ``min_width=0, dense_distance=-1`` only the sink, text and the diagonal are left. `Method.resolve` and reports name
  the settings. On `shapes-wan` at density 0.25 the relative error of the output is 0.18 in this order, and 0.32 if
  near frames are dropped first.
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
class Radial(Pattern):
    """Radial attention.

    Attributes:
        decay: width of the windows; the authors use 0.2 for Wan 2.1, 0.8 for Wan 2.2, 0.95 for HunyuanVideo.
        dense_distance: frames at most this far apart attend to each other fully; -1: no frame, not even to itself.
        min_width: least width of a window, in blocks; the authors use 1.
        sink: whether every query attends to frame 0; the authors: yes for Wan, no for HunyuanVideo.
    """

    needs_raster: ClassVar[bool] = True
    knob: ClassVar[str] = "decay"
    knob_range: ClassVar[tuple[float, float]] = (1e-4, 1e4)
    narrowing: ClassVar[tuple[tuple[str, float], ...]] = (("min_width", 0.0), ("dense_distance", -1))

    decay: float = within("(0, 1000000]", 0.95)
    dense_distance: int = within("[-1, 10000]", 1)
    min_width: float = within("[0, 1000]", 1.0)
    sink: bool = False

    def keep(self, grid: Grid, block: int) -> Tensor:
        runs = _FrameRuns.from_grid(grid, block)
        distance = (runs.frame[:, None] - runs.frame).abs()
        width, survives = self._window(distance, grid.frame, block)
        kept_columns = runs.columns_within(width, rows=block // 3 + 1)
        touched_columns = runs.columns_within(width, rows=1)
        pairs = survives & (kept_columns > 0.6 * touched_columns)
        if self.sink:
            pairs = pairs | (runs.frame == 0)
        return runs.to_blocks(pairs, num_blocks(grid.tokens, block))

    def _window(self, distance: Tensor, frame: int, block: int) -> tuple[Tensor, Tensor]:
        """Return the half-width of the window in tokens and whether thinning keeps the frame pair, by distance."""
        octave = torch.where(distance > 0, distance.clamp(min=1).double().log2().floor() + 1, 0)
        length = 2 ** frame.bit_length() / 2**octave
        width = (length * self.decay).clamp(min=self.min_width * block)
        width = torch.where(distance <= self.dense_distance, frame, width).floor().long()
        stride = (block / length).floor().clamp(min=1).long()
        return width, distance % stride == 0


@dataclass(frozen=True)
class _FrameRuns:
    """Runs of tokens of one frame in one block: positions ``low`` to ``high`` of frame ``frame`` in block ``block``."""

    block: Tensor
    frame: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def from_grid(cls, grid: Grid, block: int) -> _FrameRuns:
        token = torch.arange(grid.before, grid.before + grid.video)
        frame = (token - grid.before) // grid.frame
        starts = torch.cat([torch.ones(1, dtype=torch.bool), (token // block).diff().bool() | frame.diff().bool()])
        first = starts.nonzero().flatten()
        last = torch.cat([first[1:], torch.tensor([grid.video])]) - 1
        return cls(token[first] // block, frame[first], first % grid.frame, last % grid.frame)

    def columns_within(self, width: Tensor, rows: int) -> Tensor:
        """Return for each pair of runs how many columns l have at least ``rows`` rows k with |k - l| <= width."""
        first = torch.maximum(self.low, self.low[:, None] - width + rows - 1)
        last = torch.minimum(self.high, self.high[:, None] + width - rows + 1)
        possible = (self.high - self.low + 1 >= rows)[:, None] & (2 * width + 1 >= rows)
        return torch.where(possible, (last - first + 1).clamp(min=0), 0)

    def to_blocks(self, pairs: Tensor, blocks: int) -> Tensor:
        """Return the block mask of a mask of runs, bool ``[Qb, Qb]``: a block pair is kept if any of its runs is."""
        number = self.block[:, None] * blocks + self.block
        keep = torch.zeros(blocks * blocks, dtype=torch.bool)
        keep[number[pairs]] = True
        return keep.view(blocks, blocks)
