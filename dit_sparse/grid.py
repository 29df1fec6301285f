"""Token layout of a self-attention sequence (Grid), of its blocks (Blocks), and the position of one call (Site).

`dit_sparse.voxels.grid.VoxelGrid` is the layout of a set of voxels.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass, replace
from reprlib import Repr
from typing import Any

import torch
from torch import Tensor

MAX_TOKENS = 2**31 - 1  # plans number tokens in int32
_REPR = Repr()
_REPR.maxstring = _REPR.maxother = 60


def short_repr(value: Any) -> str:
    """Return a value as short text on one line, for messages. Values may be long or deeply nested."""
    return " ".join(_REPR.repr(value).split())


class BaseGrid:
    """Layout of one self-attention sequence: text tokens, tokens with a position in 3-D space, called video tokens, and
    text tokens. Base class of `Grid` and of `dit_sparse.voxels.grid.VoxelGrid`.

    Attributes:
        before, after: text tokens before and after the video tokens.
        video: number of video tokens.
        sides: size of their bounding box along the three axes.
    """

    before: int
    after: int
    video: int
    sides: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        """All tokens, video and text: N."""
        return self.before + self.video + self.after

    def items(self) -> list[tuple[Tensor | None, BaseGrid]]:
        """Return the independent sequences that a packed sequence holds, in the token order in which they are computed.

        Returns:
            For each item the numbers of its tokens in the packed sequence, int64 ``[N]``, and its grid. None in place
            of the numbers: the sequence is computed as it is.
        """
        return [(None, self)]

    def coordinates(self, order: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the three coordinates (int64, from 0) and is-text (bool) of every token in the given order, each
        ``[N]``. Text tokens have the coordinates of the nearest video token of the sequence."""
        raise NotImplementedError

    def _video_index(self, order: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the number of the video token at each position, or of the nearest one, and whether it is text."""
        index = torch.arange(self.tokens) if order is None else order.cpu()
        video = index - self.before
        return video.clamp(0, self.video - 1), (video < 0) | (video >= self.video)

    def with_text(self, tokens: int, side: str | None) -> BaseGrid | None:
        """Return this grid with the text length that makes it ``tokens`` long.

        Args:
            tokens: length of the sequence.
            side: "before" or "after" the video; None: the model has no text in its self-attention.

        Returns:
            None if no text length gives ``tokens``.
        """
        text = tokens - self.video
        if text < 0 or (text and side is None):
            return None
        return replace(self, before=text, after=0) if side == "before" else replace(self, before=0, after=text)


@dataclass(frozen=True)
class Grid(BaseGrid):
    """Layout of one self-attention sequence: text tokens, video tokens in row-major order, text tokens.

    A volume is a video whose frames are its slices: depth x height x width. Sets of tokens without positions, one set
    for each frame or part, are ``Grid(frames, 1, tokens)``.

    Attributes:
        frames, height, width: size of the video in latent tokens.
        before: text tokens before the video.
        after: text tokens after the video.
    """

    frames: int
    height: int
    width: int
    before: int = 0
    after: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            try:
                whole = None if isinstance(value, bool) else operator.index(value)
            except TypeError:
                whole = None
            if whole is None:
                raise ValueError(f"{name} must be a whole number of tokens, got {short_repr(value)}")
            object.__setattr__(self, name, whole)
        if min(self.frames, self.height, self.width) < 1 or min(self.before, self.after) < 0:
            raise ValueError(f"a grid needs at least 1x1x1 video tokens and no negative text length, got {self}")
        if self.tokens > MAX_TOKENS:
            raise ValueError(f"a grid can hold at most {MAX_TOKENS} tokens, got {short_repr(self.tokens)}")

    @classmethod
    def parse(cls, text: str) -> Grid:
        """Read ``"21x45x80"``, ``"21x45x80+226"`` (text after the video) or ``"226+21x45x80"`` (text before it).

        Raises:
            ValueError: the text has another form.
        """
        number = r"(\d{1,9})"
        form = rf"(?:{number}\+)?{number}x{number}x{number}(?:\+{number})?"
        match = re.fullmatch(form, re.sub(r"text|\s", "", text), re.ASCII) if isinstance(text, str) else None
        if not match:
            advice = "write 21x45x80 (frames x height x width) or 21x45x80+226"
            raise ValueError(f"cannot read the grid {short_repr(text)}: {advice}")
        before, frames, height, width, after = (int(part or 0) for part in match.groups())
        return cls(frames, height, width, before, after)

    @property
    def frame(self) -> int:
        """Tokens in one frame."""
        return self.height * self.width

    @property
    def video(self) -> int:
        """Video tokens."""
        return self.frames * self.frame

    @property
    def sides(self) -> tuple[int, int, int]:
        """Frames, height and width."""
        return self.frames, self.height, self.width

    def coordinates(self, order: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return frame, row, column (int64) and is-text (bool) of every token in the given order, each ``[N]``.

        Text tokens have the coordinates of the nearest video token.
        """
        video, text = self._video_index(order)
        return video // self.frame, video % self.frame // self.width, video % self.width, text

    def __str__(self) -> str:
        before = f"{self.before} text + " if self.before else ""
        after = f" + {self.after} text" if self.after else ""
        return f"{before}{self.frames}x{self.height}x{self.width}{after}"

    def __repr__(self) -> str:
        text = [f", {name}={getattr(self, name)}" for name in ("before", "after") if getattr(self, name)]
        return f"Grid({self.frames}, {self.height}, {self.width}{''.join(text)})"


@dataclass(frozen=True)
class Site:
    """Position of one attention call in a generation.

    Attributes:
        grid: token layout of the call: one item, see `BaseGrid.items`.
        block: tokens in a block.
        layer, layers: number of the self-attention layer, from 0, and how many there are.
        step, steps: number of the denoising step, from 0, and how many there are; None: unknown.
        branch: branch of classifier-free guidance; empty without guidance.
        plan_group: name shared by the branches that may share a plan.
        both_branches: whether the batch holds both branches, the conditional one as its second half.
        needs_plan: whether the schedule asks for a new plan at this step.
        first_head: number of the first head of the call, under context parallelism; None: the call has all heads.
        heads: numbers of the heads of the call, where a composition gives a method only some of them; None: consecutive
            ones from ``first_head``.
        component: name of the transformer in its pipeline, which may have two.
        references: tokens that are neither video nor text, such as history frames: always computed, like text, but not
            counted in the density.
        first_query: number of the first query whose output is used: the queries are the last tokens of the sequence.
    """

    grid: BaseGrid
    block: int = 128
    layer: int = 0
    layers: int = 1
    step: int = 0
    steps: int | None = None
    branch: str = ""
    plan_group: str = ""
    both_branches: bool = False
    needs_plan: bool = True
    first_head: int | None = None
    heads: tuple[int, ...] | None = None
    component: str = ""
    references: int = 0
    first_query: int = 0

    @property
    def reference_share(self) -> float:
        """Fraction of the query-key pairs with a reference token."""
        queries = self.grid.tokens - self.first_query
        among = min(self.references, self.grid.after) if self.first_query else self.references
        return 1 - (1 - self.references / self.grid.tokens) * (1 - among / queries)

    def __repr__(self) -> str:
        steps = "" if self.steps is None else f" of {self.steps}"
        branch = f", branch {self.branch}" if self.branch else ""
        layer = f"layer {self.layer} of {self.layers}"
        return f"Site({self.grid}, blocks of {self.block}, {layer}, step {self.step}{steps}{branch})"


@dataclass(frozen=True)
class Span:
    """Interval that each block covers along one axis.

    Attributes:
        low, high: first and last coordinate, both inclusive, ``[Qb]``.
    """

    low: Tensor
    high: Tensor

    def gap(self) -> Tensor:
        """Return the smallest distance between tokens of block i and block j, ``[Qb, Qb]``; 0 if they overlap."""
        return torch.maximum(self.low[:, None] - self.high, self.low - self.high[:, None]).clamp(min=0)


@dataclass(frozen=True)
class Blocks:
    """Bounding boxes of the blocks of a sequence.

    Attributes:
        frame, row, column: interval of each block along each axis.
        text: whether a block holds text tokens, bool ``[Qb]``.
    """

    frame: Span
    row: Span
    column: Span
    text: Tensor

    @classmethod
    def from_grid(cls, grid: BaseGrid, block: int, order: Tensor | None = None) -> Blocks:
        """Return the boxes of blocks of ``block`` tokens, cut from the tokens in ``order [N]``."""
        *axes, text = grid.coordinates(order)
        missing = -grid.tokens % block
        cut = lambda x: torch.cat([x, x[-1:].expand(missing)]).view(-1, block)
        spans = [Span(cut(axis).amin(1), cut(axis).amax(1)) for axis in axes]
        return cls(*spans, text=cut(text).any(1))
