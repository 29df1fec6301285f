"""Attention masks that are causal by groups of frames, and calls whose queries follow a cache of keys.

A query sees the tokens up to the end of its own part, a group of frames. Each part is computed as a call of its own:
its keys are the tokens up to its end, so that no pair of the call is masked, and only the outputs of its own queries
are used. Every method, token order and executor therefore applies. The density refers to the pairs that the mask
allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...grid import Grid, Site
from ..forward import AttentionCall, is_block_mask

ROWS = 1024  # rows of a mask that are read at once


@dataclass(frozen=True)
class CausalParts:
    """The parts of a causal sequence.

    Attributes:
        ends: number of tokens up to the end of each part. Queries after the last one see no key; their output is 0.
    """

    ends: tuple[int, ...]

    def split(self, call: AttentionCall, site: Site) -> Iterator[tuple[AttentionCall, Site | None]]:
        """Yield the call of every part, and its site, or None if no video token is among the keys. ``stock`` of such a
        call computes the outputs of the part's own queries only."""
        for start, end in pairwise((0, *self.ends)):
            q, k, v = (x[:, :, :end] for x in (call.q, call.k, call.v))
            part = replace(call, q=q, k=k, v=v, mask=None, mask_source=None, first_query=start)
            part = replace(part, stock=_plain_attention(part))
            grid = _grid_up_to(site.grid, end)
            if grid is None:
                yield part, None
                continue
            references = max(site.references - (site.grid.after - grid.after), 0)
            yield part, replace(site, grid=grid, references=references, first_query=start)

    def merge(self, outputs: list[Tensor], tokens: int) -> Tensor:
        """Return the output ``[B, H, N, D]`` from those of the parts, which may begin with unused rows."""
        sizes = [end - start for start, end in pairwise((0, *self.ends))]
        used = [out[:, :, out.shape[2] - size :] for out, size in zip(outputs, sizes, strict=True)]
        return F.pad(torch.cat(used, 2), (0, 0, 0, tokens - self.ends[-1]))


def with_missing_queries(call: AttentionCall) -> AttentionCall:
    """Return a call whose queries are the last tokens of its keys as one with all queries. The keys stand in for the
    missing queries, whose outputs are not used; ``stock`` stays that of the call."""
    missing = call.k.shape[2] - call.q.shape[2]
    filler = call.k[:, :, :missing].repeat_interleave(call.q.shape[1] // call.k.shape[1], 1)
    return replace(call, q=torch.cat([filler, call.q], 2), first_query=missing)


def read_causal(mask: Any, grid: Grid) -> CausalParts | str:
    """Return the parts of a mask, or why it is not causal by groups of frames.

    Args:
        mask: boolean or additive tensor with one matrix ``[..., N, N]``, or a ``BlockMask`` of N tokens.
        grid: token grid of the call. Text before the video belongs to the first part.
    """
    tokens, shape = grid.tokens, f"the attention mask {list(mask.shape)}"
    other = f"{shape} allows different keys for different queries"
    if is_block_mask(mask):
        mask, other = _BlockMaskRows(mask), "the model's attention mask is a BlockMask"
    if mask.numel() != tokens**2:
        return other
    position, lengths = torch.arange(tokens, device=mask.device), []
    for rows in position.split(ROWS):
        allowed = mask[rows] if isinstance(mask, _BlockMaskRows) else mask.reshape(tokens, tokens)[rows]
        allowed = allowed if allowed.dtype == torch.bool else allowed == 0
        lengths.append(allowed.sum(-1))
        if not (allowed == (position < lengths[-1][:, None])).all():
            return other
    lengths = torch.cat(lengths)
    used = int((lengths > 0).sum())
    ends = lengths[:used].unique_consecutive()
    # Every part must end where its last query is, and queries without keys must be the last ones.
    if used == 0 or not (lengths[:used] > 0).all() or not (lengths[ends - 1] == ends).all() or ends[-1] != used:
        return other
    ends = tuple(ends.tolist())
    if sorted(ends) != list(ends):
        return other
    inside = (end - grid.before for end in ends if grid.before < end < grid.before + grid.video)
    return f"{shape} is causal within a frame" if any(end % grid.frame for end in inside) else CausalParts(ends)


class _BlockMaskRows:
    """The matrix of a ``BlockMask``, read by rows: its blocks, and the pairs that ``mask_mod`` allows inside them."""

    def __init__(self, mask: Any) -> None:
        self._mask, self._blocks = mask, mask.to_dense().bool()
        self.device = self._blocks.device

    def numel(self) -> int:
        return self._blocks.shape[:-2].numel() * self._mask.shape[-2] * self._mask.shape[-1]

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return rows ``[R]`` of the matrix, bool ``[R, N]``."""
        columns = torch.arange(self._mask.shape[-1], device=self.device)
        height, width = self._mask.BLOCK_SIZE
        blocks = self._blocks.flatten(0, -3)[0][rows // height][:, columns // width]
        return blocks & self._mask.mask_mod(0, 0, rows[:, None], columns[None])


def _grid_up_to(grid: Grid, end: int) -> Grid | None:
    """Return the grid of the first ``end`` tokens of a sequence, or None if they contain no video token."""
    video = end - grid.before
    if video <= 0:
        return None
    if video >= grid.video:
        return replace(grid, after=video - grid.video)
    return replace(grid, frames=video // grid.frame, after=0)


def _plain_attention(call: AttentionCall) -> Callable[[], Tensor]:
    """Return the dense computation of the used queries of a call without a mask."""
    q = call.q[:, :, call.first_query :]
    options = {"scale": call.scale, "enable_gqa": q.shape[1] != call.k.shape[1]}
    return lambda: F.scaled_dot_product_attention(q, call.k, call.v, **options)
