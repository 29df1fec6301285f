"""Radial attention: the spatial window halves each time the temporal distance doubles.

Source: X. Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation",
arXiv:2506.19852, sec. 4. Attention between token k of frame i and token l of frame j decays exponentially in both
|i - j| and |k - l|, so a window of width ~ 2^-log2|i-j| loses little, and O(n log n) pairs remain.

The rule is that of the authors' released masks, which made the published numbers, not the paper's eq. 4. With s
tokens a frame, P the power of two above s, d = |i - j|, g the bit length of d (0, 1, 2, 2, 3, 3, 3, 3, ...):

    window     keep |k - l| <= w,  w = s where d <= near,  else max(decay * P / 2^g, floor)
    thinning   where L = P / 2^g < block, keep a frame pair only if d is a multiple of block / L
    sink       every query keeps frame 0
    blocks     keep a block pair if, of its columns with any kept token, over .6 are kept in over 1/3 of its rows

Differs from the authors: they draw each s x s frame pair as a mask and demand s to be a multiple of 128; here the same
rule is evaluated in closed form for every pair of "block cut by frame" segments, so any s, any text before or after,
and no N x N tensor; ``near``, the sink and the block size are parameters instead of model names; the cut-off of the
thinning is the block size instead of 128. ``density`` solves for ``decay``; where even the narrowest windows exceed it,
as they do when a frame is only a few blocks, the whole near frames are given up first, then the windows' floor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..grid import Grid
from ..method import Pattern
from ..plan import num_blocks


@dataclass(frozen=True, kw_only=True)
class Radial(Pattern):
    """Radial attention.

    Attributes:
        decay: width of the windows; the authors use 0.2 for Wan 2.1, 0.8 for Wan 2.2, 0.95 for HunyuanVideo.
        near: frames at most this far apart attend to each other whole; -1: not even a frame to itself.
        floor: the narrowest window, in blocks (the authors: 1).
        sink: every query keeps frame 0 (the authors: HunyuanVideo no, like the default decay; Wan yes).
    """

    knob: ClassVar[str] = "decay"
    knob_range: ClassVar[tuple[float, float]] = (1e-4, 1e4)

    decay: float = 0.95
    near: int = 1
    floor: float = 1.0
    sink: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.decay > 0 and self.near >= -1 and self.floor >= 0):
            raise ValueError(
                f"decay is positive, near at least -1, floor at least 0, not {self.decay}, {self.near}, {self.floor}"
            )

    def narrower(self) -> Radial | None:
        if self.near >= 0:
            return replace(self, near=self.near - 1)
        return replace(self, floor=0.0) if self.floor else None

    def keep(self, grid: Grid, block: int) -> Tensor:
        segment = _Segments.from_grid(grid, block)
        distance = (segment.frame[:, None] - segment.frame).abs()
        width, survives = self._window(distance, grid.frame, block)
        kept = segment.columns_seen(width, rows=block // 3 + 1)
        touched = segment.columns_seen(width, rows=1)
        pair = survives & (kept > 0.6 * touched)
        if self.sink:
            pair = pair | (segment.frame == 0)
        return segment.merge(pair, num_blocks(grid.tokens, block))

    def _window(self, distance: Tensor, frame: int, block: int) -> tuple[Tensor, Tensor]:
        """Half-width of the window for every temporal distance, in tokens, and whether the frame pair survives."""
        octave = torch.where(distance > 0, distance.clamp(min=1).double().log2().floor() + 1, 0)
        length = 2 ** frame.bit_length() / 2**octave
        width = (length * self.decay).clamp(min=self.floor * block)
        width = torch.where(distance <= self.near, frame, width).floor().long()
        stride = (block / length).floor().clamp(min=1).long()
        return width, distance % stride == 0


@dataclass(frozen=True)
class _Segments:
    """Blocks cut at the frame borders: the run ``low..high`` of positions of one frame that one block holds."""

    block: Tensor
    frame: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def from_grid(cls, grid: Grid, block: int) -> _Segments:
        token = torch.arange(grid.before, grid.before + grid.video)
        frame = (token - grid.before) // grid.frame
        starts = torch.cat([torch.ones(1, dtype=torch.bool), (token // block).diff().bool() | frame.diff().bool()])
        first = starts.nonzero().flatten()
        last = torch.cat([first[1:], torch.tensor([grid.video])]) - 1
        return cls(token[first] // block, frame[first], first % grid.frame, last % grid.frame)

    def columns_seen(self, width: Tensor, rows: int) -> Tensor:
        """For every pair of segments: how many columns l have at least ``rows`` rows k with |k - l| <= width."""
        first = torch.maximum(self.low, self.low[:, None] - width + rows - 1)
        last = torch.minimum(self.high, self.high[:, None] + width - rows + 1)
        possible = (self.high - self.low + 1 >= rows)[:, None] & (2 * width + 1 >= rows)
        return torch.where(possible, (last - first + 1).clamp(min=0), 0)

    def merge(self, pair: Tensor, blocks: int) -> Tensor:
        """A block pair is kept if any of its segments is, bool ``[Qb, Qb]``."""
        place = self.block[:, None] * blocks + self.block
        kept = torch.zeros(blocks * blocks, dtype=torch.bool)
        kept[place[pair]] = True
        return kept.view(blocks, blocks)
