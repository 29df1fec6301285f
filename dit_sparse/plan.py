"""The one currency between methods and executors: which key blocks each query block visits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

MAX_UNTRIMMED_BYTES = 16 << 20  # below this, index lists are not trimmed: that would synchronize with the GPU


def num_blocks(tokens: int, block: int) -> int:
    """Number of blocks that cover ``tokens``; the last one may be ragged."""
    return -(-tokens // block)


@dataclass(frozen=True)
class BasePlan:
    """Which groups of keys every group of queries visits, whatever the groups are.

    Leading sizes of 1 mean "the same for every batch item / head".

    Attributes:
        index: int32 ``[B|1, H|1, Q, K]``, numbers of key groups, ascending; the first ``count`` of a row are live, the
            rest are any legal number. K is the fullest row's count, or more where learning it would wait for a GPU.
        count: int32 ``[B|1, H|1, Q]``.
    """

    index: Tensor
    count: Tensor

    @property
    def valid(self) -> Tensor:
        """Which entries of ``index`` count, bool, its shape."""
        return torch.arange(self.index.shape[-1], device=self.index.device) < self.count[..., None]

    @cached_property
    def density_by_head(self) -> Tensor:
        """Fraction of the query-key token pairs that each head computes, groups weighing what they hold: float64
        ``[B|1, H|1]``."""
        kept_sizes = torch.take_along_dim(self.key_sizes[:, :, None], self.index.long(), -1)
        keys = (kept_sizes * self.valid).sum(-1)
        return (keys * self.query_sizes).sum(-1).double() / self.tokens**2

    @property
    def mean_density(self) -> Tensor:
        """The mean over the heads, a scalar on the plan's device, so that counting it waits for nothing."""
        return self.density_by_head.mean()

    @property
    def density(self) -> float:
        """The share as a number."""
        return float(self.mean_density)

    def block_mask(self) -> Tensor:
        """The boolean map of groups again, ``[B|1, H|1, Q, Qk]``."""
        groups = self.key_sizes.shape[-1]
        empty = torch.zeros(*self.index.shape[:-1], groups, dtype=torch.bool, device=self.index.device)
        return empty.scatter_reduce(-1, self.index.long(), self.valid, "amax")

    def token_mask(self, queries: Tensor) -> Tensor:
        """Which keys some queries ``[R]`` see, padding or not: bool ``[B|1, H|1, R, N]``."""
        kept = torch.take_along_dim(self.block_mask(), self.query_group[..., queries, None], 2)
        return torch.take_along_dim(kept, self.key_group[..., None, :], 3)

    def full(self) -> BasePlan:
        """The same groups, each visiting all of them: dense attention, as a plan."""
        rows, columns = self.query_sizes.shape[-1], self.key_sizes.shape[-1]
        index = torch.arange(columns, dtype=torch.int32, device=self.index.device)
        count = torch.full((), columns, dtype=torch.int32, device=self.index.device)
        return replace(self, index=index.expand(1, 1, rows, -1), count=count.expand(1, 1, rows))

    def repeat_batch(self) -> BasePlan:
        """The same plan for a batch in which every item stands twice, in two equal halves."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        lengths = None if self.lengths is None else self.lengths.repeat(2)
        return replace(self, **{name: repeat_batch(value) for name, value in values}).with_lengths(lengths)

    def with_lengths(self, lengths: Tensor | None) -> BasePlan:
        """The same plan for a batch whose items end in padding: ``lengths [B]`` real tokens each."""
        return self if lengths is None else replace(self, lengths=lengths.to(self.index.device, torch.int32))

    def to(self, device: torch.device | str) -> BasePlan:
        """The same plan on another device."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return replace(self, **{name: value.to(device) for name, value in values if hasattr(value, "to")})


def repeat_batch(value: Any) -> Any:
    """A part of a plan for a batch in which every item stands twice; what is one for all items stays so."""
    if hasattr(value, "repeat_batch"):
        return value.repeat_batch()
    one_for_all = not isinstance(value, Tensor) or value.ndim < 3 or len(value) == 1
    return value if one_for_all else torch.cat([value, value])


def lists_from_mask(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Index and count of a boolean map ``[B|1, H|1, Q, Qk]``. Raises as `check_rows` does."""
    place = keep.cumsum(-1)
    count = place[..., -1].int()
    check_rows(count)
    width = list_width(count, keep.shape[-1])
    index = torch.zeros(*keep.shape[:-1], 1 + width, dtype=torch.int32, device=keep.device)
    number = torch.arange(keep.shape[-1], dtype=torch.int32, device=keep.device).expand(keep.shape)
    index.scatter_(-1, place.mul_(keep), number)  # what is not kept goes to place 0
    return index[..., 1:].contiguous(), count


def check_rows(count: Tensor) -> None:
    """Raises ValueError when a row keeps nothing. On a GPU, where nobody waits to look, the device is to assert it:
    what waits for it next fails."""
    wrong = "a query block keeps no key block; every row must keep at least one"
    if count.is_cuda:
        torch._assert_async((count > 0).all(), wrong)
    elif (count == 0).any():
        raise ValueError(wrong)


def list_width(count: Tensor, columns: int) -> int:
    """How wide lists of ``count`` entries a row have to be: as the fullest row. On a GPU, where finding it waits for
    the device, as wide as they could ever be, unless that takes much memory; then attention takes much longer."""
    if count.is_cuda and count.numel() * columns * torch.int32.itemsize <= MAX_UNTRIMMED_BYTES:
        return columns
    return int(count.max())


@dataclass(frozen=True)
class Plan(BasePlan):
    """Lists of equal blocks, and the token order that the blocks are cut from.

    Q = ceil(N / block), for queries and keys alike.

    Attributes:
        tokens: N, the length of the sequence.
        block: tokens in a block; the last block holds what is left.
        order: int64 ``[N]`` or ``[B|1, H|1, N]``; place i of the blocked sequence holds token ``order[..., i]``.
            None: as given. Padding must stay at the end.
        lengths: int32 ``[B]``, tokens of each batch item that are no padding (padding is a tail). None: all.
    """

    tokens: int
    block: int
    order: Tensor | None = None
    lengths: Tensor | None = None

    @classmethod
    def from_mask(cls, keep: Tensor, tokens: int, block: int, order: Tensor | None = None) -> Plan:
        """From a boolean block map ``keep [B|1, H|1, Qb, Qb]``. Raises ValueError when a row keeps nothing."""
        blocks = num_blocks(tokens, block)
        if keep.ndim != 4 or keep.shape[-2:] != (blocks, blocks):
            raise ValueError(
                f"{tokens} tokens in blocks of {block} need a map [B, H, {blocks}, {blocks}], not {list(keep.shape)}"
            )
        return cls(*lists_from_mask(keep), tokens, block, order)

    @classmethod
    def by_head(cls, plans: Sequence[Plan], choice: Tensor) -> Plan:
        """One plan out of several for the same blocks: head h of item b follows ``plans[choice[b, h]]``.

        Args:
            plans: each for one head or for all, of one item or of all.
            choice: int64 ``[B|1, H]``.
        """
        batches = [x.shape[0] for plan in plans for x in (plan.index, plan.order) if x is not None and x.ndim > 1]
        lead = (max(choice.shape[0], *batches), choice.shape[1])
        width = max(plan.index.shape[-1] for plan in plans)
        fill = lambda index: torch.cat([index, index[..., :1].expand(*index.shape[:-1], width - index.shape[-1])], -1)
        index = _chosen([fill(plan.index) for plan in plans], choice, lead)
        count = _chosen([plan.count for plan in plans], choice, lead)
        order = None
        if any(plan.order is not None for plan in plans):
            given = torch.arange(plans[0].tokens, device=choice.device)
            orders = (given if plan.order is None else plan.order for plan in plans)
            order = _chosen([o.expand(1, 1, -1) if o.ndim == 1 else o for o in orders], choice, lead)
        return cls(index, count, plans[0].tokens, plans[0].block, order)

    def expand_heads(self, heads: Tensor, total: int) -> Plan:
        """The same plan for all ``total`` heads of a layer, where it was made for some of them: ``heads [H']``. What
        the others get is not meant to be used."""
        place = torch.zeros(total, dtype=torch.long, device=self.index.device)
        place[heads] = torch.arange(len(heads), device=place.device)
        lift = lambda x: x if x is None or x.ndim == 1 or x.shape[1] == 1 else x.index_select(1, place)
        return replace(self, index=lift(self.index), count=lift(self.count), order=lift(self.order))

    @classmethod
    def dense(cls, tokens: int, block: int, device: torch.device | str = "cpu") -> Plan:
        """Every block visits every block: dense attention, as a plan."""
        first = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=device)
        return cls(first, first[..., 0] + 1, tokens, block).full()

    @property
    def blocks(self) -> int:
        return num_blocks(self.tokens, self.block)

    @property
    def query_sizes(self) -> Tensor:
        """Tokens in each block, int64 ``[1, 1, Qb]``."""
        starts = torch.arange(self.blocks, device=self.index.device) * self.block
        return (self.tokens - starts).clamp(max=self.block)[None, None]

    key_sizes = query_sizes

    @property
    def query_group(self) -> Tensor:
        """The block of every token, int64 ``[B|1, H|1, N]``."""
        place = torch.arange(self.tokens, device=self.index.device)
        if self.order is not None:
            place = self.order.argsort(-1)
        return (place // self.block).expand(1, 1, -1) if place.ndim == 1 else place // self.block

    key_group = query_group

    def arrange(self, x: Tensor) -> Tensor:
        """``x [B, H, N, ...]`` in the plan's order."""
        return reorder(x, self.order)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`arrange`."""
        return x if self.order is None else reorder(x, self.order.argsort(-1))


def _chosen(values: Sequence[Tensor], choice: Tensor, lead: tuple[int, int]) -> Tensor:
    """Item and head ``[b, h]`` of ``values[choice[b, h]]``, each ``[B|1, H|1, ...]``."""
    shape = (*lead, *values[0].shape[2:])
    number = choice.view(*choice.shape, *(1,) * (len(shape) - 2))
    result = values[0].expand(shape)
    for i, value in enumerate(values[1:], 1):
        result = torch.where(number == i, value, result)
    return result


def reorder(x: Tensor, order: Tensor | None) -> Tensor:
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
