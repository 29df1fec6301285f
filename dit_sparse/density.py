"""The density of a plan: the fraction of all query-key pairs of a call, those with text included, that it computes.

One rule holds for all methods. Some pairs are computed at every density: the rows and columns of text, and required
blocks such as the diagonal. They count in the density. The remaining pairs are divided equally among the rows of the
video; a row whose required groups exceed its part keeps only these. Methods whose papers set one threshold for a head
divide them among the rows by it (`VideoBlocks.keep_by_head`). A plan therefore meets the density to within half a pair
of blocks, unless the required pairs exceed it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from .grid import Blocks, Grid
from .kernels.planning.selection import CountSelector, select_top
from .plan import num_blocks

FEW_ROWS = 16  # with fewer rows, one smaller group changes the density by more than 0.01
PHASES = (0.5, 0.5, 0.25, 0.75, 0.5, 0.0)  # by attempt: phase of the pattern by which some rows keep one group more


def pair_weights(grid: Grid, block: int) -> Tensor:
    """Return the fraction of all token pairs that lies in each block pair, float64 ``[Qb, Qb]``."""
    size = _block_sizes(grid, block).double() / grid.tokens
    return size[:, None] * size


def _block_sizes(grid: Grid, block: int) -> Tensor:
    starts = torch.arange(num_blocks(grid.tokens, block)) * block
    return (grid.tokens - starts).clamp(max=block)


@dataclass(frozen=True)
class VideoBlocks:
    """The V blocks without text of a call, from which a method selects. Blocks with text are always kept.

    Attributes:
        index: their numbers, int64 ``[V]``; None: no block holds text.
        sizes: their tokens, int64 ``[V]``.
        own: the diagonal, bool ``[V, V]``: every row keeps its own block.
        block: tokens in a block.
        total, tokens: tokens of the call and of these blocks.
    """

    index: Tensor | None
    sizes: Tensor
    own: Tensor
    block: int
    total: int
    tokens: int

    @classmethod
    def from_grid(cls, grid: Grid, block: int, order: Tensor | None = None) -> VideoBlocks:
        """Return the blocks that are cut from the tokens in ``order [N]``."""
        text, sizes = Blocks.from_grid(grid, block, order).text, _block_sizes(grid, block)
        index = (~text).nonzero().flatten() if text.any() else None
        sizes = sizes if index is None else sizes[index]
        return cls(index, sizes, torch.eye(len(sizes), dtype=torch.bool), block, grid.tokens, int(sizes.sum()))

    def to(self, device: torch.device | str) -> VideoBlocks:
        """Return the blocks on another device."""
        index = None if self.index is None else self.index.to(device)
        return replace(self, index=index, sizes=self.sizes.to(device), own=self.own.to(device))

    def pairs(self, density: float) -> float:
        """Return the token pairs that a density of the call leaves to these blocks; negative if text exceeds it."""
        return density * self.total**2 - (self.total**2 - self.tokens**2)

    @property
    def own_pairs(self) -> int:
        """Token pairs on the diagonal."""
        last = self.tokens % self.block
        return self.tokens // self.block * self.block**2 + last**2

    def choose(self, scores: Tensor, keep: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the mask of all blocks ``[B, H, Qb, Qb]``; ``keep`` chooses from the scores ``[B, H, V, V]`` of these
        blocks."""
        if self.index is None:
            return keep(scores)
        mask = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
        if self.tokens:
            rows = self.index[:, None]
            mask[..., rows, self.index] = keep(scores[..., rows, self.index])
        return mask

    def keep_at(self, scores: Tensor, pairs: float | Tensor) -> Tensor:
        """Return the mask of the best of these blocks, ``[B, H, V, V]``, as `keep_pairs` does."""
        ragged = self.tokens % self.block > 0
        return keep_pairs(scores, pairs, self.sizes, self.sizes, self.own, equal=True, ragged=ragged)

    def keep_by_head(self, scores: Tensor, pairs: float | Tensor) -> Tensor:
        """Return the mask of the best blocks of each head, ``[B, H, V, V]``. All rows of a head have the same threshold
        and therefore keep different numbers of blocks, at least their own."""
        sizes, one = (self.sizes[:, None] * self.sizes).flatten(), torch.ones_like(self.sizes[:1])
        keep = keep_pairs(scores.flatten(2)[:, :, None], pairs, one, sizes, self.own.flatten(), ragged=False)
        return keep.view(scores.shape)


@lru_cache(maxsize=16)
def video_blocks(grid: Grid, block: int, device: torch.device) -> VideoBlocks:
    """Return the blocks without text in the order of the input, cached on a device."""
    return VideoBlocks.from_grid(grid, block).to(device)


def text_density(grid: Grid) -> float:
    """Return the fraction of the token pairs with at least one text token."""
    return 1 - (grid.video / grid.tokens) ** 2


def keep_pairs(
    scores: Tensor,
    pairs: float | Tensor,
    row_sizes: Tensor,
    column_sizes: Tensor,
    required: Tensor | None = None,
    equal: bool = False,
    ragged: bool = True,
) -> Tensor:
    """Return the mask of the best key groups of every row, with ``pairs`` token pairs in every head.

    With equal groups, rows alternate between one group more and one group less than the mean, so that the sum is exact.

    Args:
        scores: ``[B, H, Q, K]``; +inf is always kept.
        pairs: token pairs of a head: a number, or one for each head, ``[B|1, H]``.
        row_sizes, column_sizes: tokens of each group, ``[Q]`` or ``[B|1, H|1, Q]``, and the same for K.
        required: groups to keep in any case, bool ``[Q, K]`` or ``[B|1, H|1, Q, K]``.
        equal: whether all groups, except possibly the last one, have the same number of tokens.
        ragged: whether the sizes of any groups differ. If so, further passes correct the sum: one, or several for few
            rows.
    """
    scores = scores if required is None else scores.masked_fill(required, torch.inf)
    columns = column_sizes.float()[..., None, :]
    tokens_of = lambda mask: torch.where(mask, columns, 0.0).sum(-1, dtype=torch.float64)
    pairs_of = lambda mask: (tokens_of(mask) * row_sizes).sum(-1)
    forced = scores.isposinf()
    forced_tokens, forced_groups = tokens_of(forced), forced.sum(-1)
    other_tokens = (columns.sum(-1) - forced_tokens).clamp(min=1)
    if not isinstance(pairs, Tensor):
        pairs = torch.full((), pairs, dtype=torch.float64, device=scores.device)

    selector = CountSelector(scores) if equal else None

    def choose(pairs: Tensor, phase: float = 0.5) -> Tensor:
        tokens = (_level(forced_tokens, row_sizes.double(), pairs)[..., None] - forced_tokens).clamp(min=0)
        if not equal:
            return select_top(scores, (forced_tokens + tokens)[..., None], columns, to_nearest=True)
        groups = (tokens / other_tokens).clamp(max=1) * (scores.shape[-1] - forced_groups)
        so_far = (groups.cumsum(-1) + phase).floor()
        groups = so_far.diff(dim=-1, prepend=torch.zeros_like(so_far[..., :1]))
        return selector.keep((forced_groups + groups)[..., None])

    keep = choose(pairs)
    if not ragged:
        return keep
    missing = pairs - pairs_of(keep)
    target = pairs + missing
    for phase in PHASES[: 1 if scores.shape[-2] > FEW_ROWS else None]:
        other = choose(target, phase)
        other_missing = pairs - pairs_of(other)
        is_better = other_missing.abs() < missing.abs()
        keep = torch.where(is_better[..., None, None], other, keep)
        missing = torch.where(is_better, other_missing, missing)
        target = target + other_missing / 2
    return keep


def share_pairs(pairs: float, weights: Tensor, least: float, most: float) -> Tensor:
    """Divide token pairs among heads in proportion to weights, within bounds.

    Args:
        pairs: mean over the heads.
        weights: positive, ``[B, H]``.
        least, most: bounds of one head.

    Returns:
        float64 ``[B, H]`` with the mean ``pairs``, or the nearer bound in all heads if ``pairs`` exceeds it.
    """
    weights, pairs = weights.double(), min(max(pairs, least), most)
    scales = torch.cat([least / weights, most / weights], -1).sort(-1).values  # where a head leaves or meets a bound
    means = (scales[..., None] * weights[:, None]).clamp(least, most).mean(-1)
    above = (means <= pairs).sum(-1, keepdim=True).clamp(max=scales.shape[-1] - 1)
    (low, high), (low_mean, high_mean) = ((x.gather(-1, above - 1), x.gather(-1, above)) for x in (scales, means))
    part = (pairs - low_mean) / (high_mean - low_mean).clamp(min=1e-9)
    return ((low + part * (high - low)) * weights).clamp(least, most)


def _level(forced: Tensor, sizes: Tensor, pairs: Tensor) -> Tensor:
    """Return the number of tokens t, ``[B, H]``, at which rows that keep max(forced, t) tokens hold ``pairs`` pairs.

    Args:
        forced: tokens that each row keeps in any case, float64 ``[B, H, Q]``.
        sizes: tokens of each row, ``[Q]`` or ``[B|1, H|1, Q]``.
        pairs: ``[]`` or ``[B|1, H]``.
    """
    forced, order = forced.sort(-1)
    sizes = sizes.expand_as(forced).gather(-1, order)
    filled, held = sizes.cumsum(-1), (sizes * forced).cumsum(-1)
    above = held[..., -1:] - held  # pairs of the rows that keep more than this one
    is_reached = forced * filled + above <= pairs[..., None]
    last = (is_reached.sum(-1, keepdim=True) - 1).clamp(min=0)
    level = (pairs[..., None] - above.gather(-1, last)) / filled.gather(-1, last).clamp(min=1)
    return torch.where(is_reached.any(-1, keepdim=True), level, forced[..., :1])[..., 0]


def meet_density(
    stages: Sequence[Callable[[float], Tensor]], required: Tensor, weights: Tensor, density: float
) -> tuple[int, float, Tensor]:
    """Return the stage, the knob in [0, 1] and the mask of a pattern at a density, bool ``[Qb, Qb]``.

    The first stage that is sparse enough at 0 is bisected. The blocks of the next denser mask are then added, nearest
    to the diagonal first and evenly over the rows, until the density is met.

    Args:
        stages: masks with the required blocks for a value of the knob, which adds blocks from 0 to 1. The next stage at
            1 is this stage at 0.
        required: blocks to keep even if they alone exceed the density.
        weights: fraction of the token pairs in each block pair.
        density: fraction of the token pairs to keep.
    """
    measure = lambda keep: float(weights[keep].sum())
    stage, inner = next(
        ((i, keep) for i, keep in enumerate(at(0.0) for at in stages) if measure(keep) <= density), (None, None)
    )
    if stage is None:
        return len(stages) - 1, 0.0, _fill(required, stages[-1](0.0), weights, density)
    low, high, outer = 0.0, 1.0, stages[stage](1.0)
    if measure(outer) <= density:
        return stage, 1.0, _fill(outer, torch.ones_like(outer), weights, density)
    while measure(outer) - density > 1e-3 and high - low > 1e-6:
        middle = (low + high) / 2
        candidate = stages[stage](middle)
        if measure(candidate) <= density:
            low, inner = middle, candidate
        else:
            high, outer = middle, candidate
    return stage, low, _fill(inner, outer, weights, density)


def _fill(inner: Tensor, outer: Tensor, weights: Tensor, density: float) -> Tensor:
    """Return ``inner`` and as many blocks of ``outer`` as come closest to the density: nearest to the diagonal first,
    evenly over the rows."""
    extra = outer & ~inner
    position = torch.arange(len(inner))
    distance = (position[:, None] - position).abs().masked_fill(~extra, len(inner))
    rank = distance.argsort(dim=1, stable=True).argsort(dim=1)
    candidates = extra.nonzero()[rank[extra].argsort(stable=True)]
    rows, columns = candidates.unbind(1)
    weight = weights[rows, columns]
    fits = weight.cumsum(0) - weight / 2 <= density - float(weights[inner].sum()) + 1e-9
    keep = inner.clone()
    keep[rows[fits], columns[fits]] = True
    return keep
