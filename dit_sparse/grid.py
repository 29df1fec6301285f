"""Where each token lies, and where we are when a decision is asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """One self-attention sequence: ``before`` text tokens, ``frames x height x width`` video tokens in row-major
    order, then ``after`` text tokens."""

    frames: int
    height: int
    width: int
    before: int = 0
    after: int = 0

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1 or min(self.before, self.after) < 0:
            raise ValueError(f"a grid needs at least 1x1x1 video tokens and no negative text length, not {self}")

    @classmethod
    def parse(cls, text: str) -> Grid:
        """``"21x45x80"`` or ``"21x45x80+226"`` (text after the video) or ``"226+21x45x80"`` (text before it)."""
        match = re.fullmatch(r"(?:(\d+)\+)?(\d+)x(\d+)x(\d+)(?:\+(\d+))?", re.sub(r"text|\s", "", text))
        if not match:
            raise ValueError(
                f"cannot read the grid {text!r}: write frames x height x width, as in 21x45x80 or 21x45x80+226"
            )
        before, frames, height, width, after = (int(part or 0) for part in match.groups())
        return cls(frames, height, width, before, after)

    @property
    def frame(self) -> int:
        """Tokens in one frame."""
        return self.height * self.width

    @property
    def video(self) -> int:
        return self.frames * self.frame

    @property
    def tokens(self) -> int:
        return self.before + self.video + self.after

    def with_text(self, tokens: int, side: str | None) -> Grid | None:
        """This grid with the text that makes ``tokens`` in all on the given side, or None where that cannot be."""
        text = tokens - self.video
        if text < 0 or (text and side is None):
            return None
        return replace(self, before=text, after=0) if side == "before" else replace(self, before=0, after=text)

    def coordinates(self, order: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Frame, row, column (int64) and is-text (bool) of every token in the given order, each ``[N]``.
        Text tokens carry the coordinates of the nearest video token."""
        index = torch.arange(self.tokens) if order is None else order.cpu()
        video = index - self.before
        text = (video < 0) | (video >= self.video)
        video = video.clamp(0, self.video - 1)
        return video // self.frame, video % self.frame // self.width, video % self.width, text

    def __str__(self) -> str:
        before = f"{self.before} text + " if self.before else ""
        after = f" + {self.after} text" if self.after else ""
        return f"{before}{self.frames}x{self.height}x{self.width}{after}"


@dataclass(frozen=True)
class Site:
    """Where and when a plan is asked for. Steps count from 0; ``steps`` is None while the total is unknown; ``pair``:
    what a branch of guidance has in common with its other one; ``both``: whether this batch holds them both, that of
    the prompt as its second half; ``due``: whether the schedule wants a new plan now."""

    grid: Grid
    block: int = 128
    layer: int = 0
    layers: int = 1
    step: int = 0
    steps: int | None = None
    branch: str = ""
    plan_group: str = ""
    both_branches: bool = False
    needs_plan: bool = True


@dataclass(frozen=True)
class Span:
    """The interval each block covers along one axis: ``low`` and ``high``, both inclusive, ``[Qb]``."""

    low: Tensor
    high: Tensor

    def gap(self) -> Tensor:
        """Smallest distance between the tokens of block i and those of block j, ``[Qb, Qb]``; 0 where they overlap."""
        return torch.maximum(self.low[:, None] - self.high, self.low - self.high[:, None]).clamp(min=0)


@dataclass(frozen=True)
class Blocks:
    """Where the blocks of a sequence lie: their frames, rows and columns, and which hold text."""

    frame: Span
    row: Span
    column: Span
    text: Tensor

    @classmethod
    def from_grid(cls, grid: Grid, block: int, order: Tensor | None = None) -> Blocks:
        *axes, text = grid.coordinates(order)
        short = -grid.tokens % block
        cut = lambda x: torch.cat([x, x[-1:].expand(short)]).view(-1, block)
        spans = [Span(cut(axis).amin(1), cut(axis).amax(1)) for axis in axes]
        return cls(*spans, text=cut(text).any(1))
