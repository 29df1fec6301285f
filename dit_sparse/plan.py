"""The one currency between methods and executors: which key blocks each query block visits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


def blocks_in(tokens: int, block: int) -> int:
    """Number of blocks that cover ``tokens``; the last one may be ragged."""
    return -(-tokens // block)


@dataclass(frozen=True)
class Plan:
    """Count and index of the key blocks of every query block, and the token order the blocks are cut from.

    Qb = ceil(N / block). Leading sizes of 1 mean "the same for every batch item / head".

    Attributes:
        index: int32 ``[B|1, H|1, Qb, K]``, key-block numbers, ascending; the first ``count`` of a row are live, the
            rest repeat a legal number. K is the fullest row's count: never as wide as it could be.
        count: int32 ``[B|1, H|1, Qb]``.
        tokens: N, the length of the sequence.
        block: tokens in a block; the last block holds what is left.
        order: int64 ``[N]`` or ``[B|1, H|1, N]``; place i of the blocked sequence holds token ``order[..., i]``.
            None: as given. Padding must stay at the end.
        lengths: int32 ``[B]``, tokens of each batch item that are no padding (padding is a tail). None: all.
    """

    index: Tensor
    count: Tensor
    tokens: int
    block: int
    order: Tensor | None = None
    lengths: Tensor | None = None

    @classmethod
    def of(cls, keep: Tensor, tokens: int, block: int, order: Tensor | None = None) -> Plan:
        """From a boolean block map ``keep [B|1, H|1, Qb, Qb]``. Raises ValueError when a row keeps nothing."""
        blocks = blocks_in(tokens, block)
        if keep.ndim != 4 or keep.shape[-2:] != (blocks, blocks):
            raise ValueError(
                f"{tokens} tokens in blocks of {block} need a map [B, H, {blocks}, {blocks}], not {list(keep.shape)}"
            )
        count = keep.sum(-1, dtype=torch.int32)
        if (count == 0).any():
            raise ValueError("a query block keeps no key block; every row must keep at least one")
        width = int(count.max())
        live_first = (~keep).to(torch.int8).argsort(dim=-1, stable=True)[..., :width].to(torch.int32)
        spare = torch.arange(width, device=keep.device) >= count[..., None]
        return cls(torch.where(spare, live_first[..., :1], live_first), count, tokens, block, order)

    @classmethod
    def full(cls, tokens: int, block: int, device: torch.device | str = "cpu") -> Plan:
        """Every block visits every block: dense attention, as a plan."""
        blocks = blocks_in(tokens, block)
        return cls.of(torch.ones(1, 1, blocks, blocks, dtype=torch.bool, device=device), tokens, block)

    @property
    def blocks(self) -> int:
        return blocks_in(self.tokens, self.block)

    @property
    def sizes(self) -> Tensor:
        """Tokens in each block, int64 ``[Qb]``."""
        starts = torch.arange(self.blocks, device=self.index.device) * self.block
        return (self.tokens - starts).clamp(max=self.block)

    @property
    def live(self) -> Tensor:
        """Which entries of ``index`` count, bool, its shape."""
        return torch.arange(self.index.shape[-1], device=self.index.device) < self.count[..., None]

    @cached_property
    def share(self) -> Tensor:
        """Fraction of all query-key token pairs that is computed, ragged blocks weighing what they hold: a float64
        scalar on the plan's device, so that counting it waits for nothing."""
        keys = (self.sizes[self.index.long()] * self.live).sum(-1)
        return (keys * self.sizes).sum(-1).double().mean() / self.tokens**2

    @property
    def density(self) -> float:
        """The share as a number."""
        return float(self.share)

    def keep(self) -> Tensor:
        """The boolean block map again, ``[B|1, H|1, Qb, Qb]``."""
        empty = torch.zeros(*self.index.shape[:-1], self.blocks, dtype=torch.bool, device=self.index.device)
        return empty.scatter_reduce(-1, self.index.long(), self.live, "amax")

    def to(self, device: torch.device | str) -> Plan:
        move = lambda x: None if x is None else x.to(device)
        return replace(
            self,
            index=move(self.index),
            count=move(self.count),
            order=move(self.order),
            lengths=move(self.lengths),
        )

    def padded(self, lengths: Tensor | None) -> Plan:
        """The same plan for a batch whose items end in padding: ``lengths [B]`` real tokens each."""
        return self if lengths is None else replace(self, lengths=lengths.to(self.index.device, torch.int32))

    def arrange(self, x: Tensor) -> Tensor:
        """``x [B, H, N, ...]`` in the plan's order."""
        return arranged(x, self.order)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`arrange`."""
        return x if self.order is None else arranged(x, self.order.argsort(-1))


def arranged(x: Tensor, order: Tensor | None) -> Tensor:
    """``x [B, H, N, ...]`` in an order ``[N]`` or ``[B|1, H|1, N]``; fewer heads than there are orders are repeated."""
    if order is None:
        return x
    if order.ndim == 1:
        return x.index_select(2, order)
    if x.shape[1] < order.shape[1]:
        x = x.repeat_interleave(order.shape[1] // x.shape[1], 1)
    order = order.expand(*x.shape[:2], -1)
    if x.ndim == 4:
        order = order[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, order)
