"""Plans: the key blocks that each query block attends to, made by methods and computed by executors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .kernels.key_lists import lists_from_mask
from .order import reorder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .grid import Grid


def num_blocks(tokens: int, block: int) -> int:
    """Return the number of blocks that cover ``tokens``; the last one may be shorter."""
    return -(-tokens // block)


@dataclass(frozen=True)
class BasePlan:
    """Block-sparse attention mask as lists: the key groups (blocks or clusters) that each query group attends to.

    A leading size of 1 means "the same for every batch item / head".

    Attributes:
        index: numbers of key groups, int32 ``[B|1, H|1, Q, K]``, ascending. Only the first ``count`` of a row are
            valid; the others hold any existing number. K is the largest count, or more if trimming would synchronize
            with a GPU.
        count: length of each list, int32 ``[B|1, H|1, Q]``.
        tail: greatest number of tokens of a pooled term. The key groups that a row does not keep take part in its
            softmax as means of this many consecutive tokens (`dit_sparse.kernels.tail`). None: they do not take part.
        first_query: number of the first query whose output is used; see :meth:`for_queries`.
    """

    index: Tensor
    count: Tensor

    @property
    def valid(self) -> Tensor:
        """Which entries of ``index`` are valid, bool ``[B|1, H|1, Q, K]``."""
        return torch.arange(self.index.shape[-1], device=self.index.device) < self.count[..., None]

    @cached_property
    def density_by_head(self) -> Tensor:
        """Fraction of the query-key token pairs that each head computes, float64 ``[B|1, H|1]``."""
        return (self._sum_kept(self.key_sizes) * self._used_sizes).sum(-1).double() / self._pairs

    @property
    def mean_density(self) -> Tensor:
        """Mean over the heads as a scalar tensor: unlike :attr:`density` it does not synchronize with a GPU."""
        return self.density_by_head.mean()

    @property
    def density(self) -> float:
        """Fraction of the query-key token pairs that is computed, mean over the heads."""
        return float(self.mean_density)

    @cached_property
    def mean_tail_density(self) -> Tensor | float:
        """Pairs of a query and a pooled term, as a fraction of the query-key token pairs, mean over the heads: a scalar
        tensor, which does not synchronize with a GPU, or 0 without a tail."""
        if self.tail is None:
            return 0.0
        terms = -(-self.key_sizes // self.tail)
        dropped = terms.sum(-1, keepdim=True) - self._sum_kept(terms)
        return ((dropped * self._used_sizes).sum(-1).double() / self._pairs).mean()

    @property
    def tail_density(self) -> float:
        """Pairs of a query and a pooled term, as a fraction of the query-key token pairs, mean over the heads. The cost
        of a plan relative to dense attention is about ``density + tail_density``."""
        return float(self.mean_tail_density)

    @cached_property
    def _used_sizes(self) -> Tensor:
        """Queries of each group whose outputs are used, int64 ``[B|1, H|1, Q]``."""
        if not self.first_query:
            return self.query_sizes
        group = self.query_group[..., self.first_query :]
        sizes = group.new_zeros(*group.shape[:-1], self.query_sizes.shape[-1])
        return sizes.scatter_add_(-1, group, torch.ones_like(group))

    @property
    def _pairs(self) -> int:
        return (self.tokens - self.first_query) * self.tokens

    def _sum_kept(self, values: Tensor) -> Tensor:
        """Return the sum of ``values [B|1, H|1, Qk]`` over the key groups that each row keeps, ``[B|1, H|1, Q]``."""
        return (torch.take_along_dim(values[:, :, None], self.index.long(), -1) * self.valid).sum(-1)

    def block_mask(self) -> Tensor:
        """Return the mask of groups, bool ``[B|1, H|1, Q, Qk]``."""
        groups = self.key_sizes.shape[-1]
        mask = torch.zeros(*self.index.shape[:-1], groups, dtype=torch.bool, device=self.index.device)
        return mask.scatter_reduce(-1, self.index.long(), self.valid, "amax")

    def token_mask(self, queries: Tensor) -> Tensor:
        """Return the mask of tokens for the queries ``[R]``, bool ``[B|1, H|1, R, N]``; padding is not masked."""
        rows = torch.take_along_dim(self.block_mask(), self.query_group[..., queries, None], 2)
        return torch.take_along_dim(rows, self.key_group[..., None, :], 3)

    def full(self) -> BasePlan:
        """Return a plan of the same groups that computes all pairs."""
        rows, columns = self.query_sizes.shape[-1], self.key_sizes.shape[-1]
        index = torch.arange(columns, dtype=torch.int32, device=self.index.device)
        count = torch.full((), columns, dtype=torch.int32, device=self.index.device)
        return replace(self, index=index.expand(1, 1, rows, -1), count=count.expand(1, 1, rows), tail=None)

    def for_queries(self, first: int) -> BasePlan:
        """Return the plan for the queries from number ``first`` on, whose outputs alone are used.

        Groups without any of these queries keep one key group, because every row must keep one. These pairs are no part
        of the density.
        """
        if not first:
            return self
        plan = replace(self, first_query=first)
        count = torch.where(plan._used_sizes > 0, self.count, 1)
        return replace(plan, index=self.index.expand(*count.shape, -1), count=count)

    def repeat_batch(self) -> BasePlan:
        """Return the plan for the batch repeated twice, ``[B, ...] -> [2 B, ...]``."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        lengths = None if self.lengths is None else self.lengths.repeat(2)
        return replace(self, **{name: repeat_batch(value) for name, value in values}).with_lengths(lengths)

    def with_lengths(self, lengths: Tensor | None) -> BasePlan:
        """Return the plan with ``lengths [B]``, the tokens of each item before its padding; None: no padding."""
        return self if lengths is None else replace(self, lengths=lengths.to(self.index.device, torch.int32))

    def with_tail(self, tail: int | None) -> BasePlan:
        """Return the plan with pooled terms of at most ``tail`` tokens, a number from 1 on; None: without."""
        if tail is not None and tail < 1:
            raise ValueError(f"a pooled term must hold at least one token, got tail={tail}")
        return replace(self, tail=tail)

    def to(self, device: torch.device | str) -> BasePlan:
        """Return the plan on another device."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return replace(self, **{name: value.to(device) for name, value in values if hasattr(value, "to")})

    def plot(self, grid: Grid | None = None) -> Figure:
        """Plot the mask of the first head and, given the token grid, the keys that one query attends to."""
        from .plotting.masks import plot_plan

        return plot_plan(self, grid)

    def _repr_html_(self) -> str:
        from .plotting.style import figure_to_html

        return f"<p>{self}</p>" + ("" if self.index.is_meta else figure_to_html(self.plot()))

    def _repr(self, groups: str) -> str:
        try:
            density = f"{self.density:.2f}"
        except RuntimeError:  # meta and fake tensors hold no numbers
            density = "unknown"
        tail = f", pooled tail of {self.tail} tokens" if self.tail else ""
        return f"{type(self).__name__}({self.tokens} tokens, {groups}, density {density}{tail})"


def repeat_batch(value: Any) -> Any:
    """Return a field of a plan for the batch repeated twice; a value that all items share is returned as it is."""
    if hasattr(value, "repeat_batch"):
        return value.repeat_batch()
    shared = not isinstance(value, Tensor) or value.ndim < 3 or len(value) == 1
    return value if shared else torch.cat([value, value])


@dataclass(frozen=True)
class Plan(BasePlan):
    """Plan of equal blocks: which key blocks each query block attends to, and the token order they are cut from.

    Queries and keys are cut into the same ceil(N / block) blocks.

    Attributes:
        tokens: N, length of the sequence.
        block: tokens in a block; the last block may hold fewer.
        order: int64 ``[N]`` or ``[B|1, H|1, N]``; position i of the reordered sequence holds token ``order[..., i]``.
            None: the order of the input. Padding must stay at the end.
        lengths: tokens of each batch item before its padding, int32 ``[B]``. None: no padding.
    """

    tokens: int
    block: int
    order: Tensor | None = None
    lengths: Tensor | None = None
    tail: int | None = None
    first_query: int = 0

    @classmethod
    def from_mask(cls, keep: Tensor, tokens: int, block: int, order: Tensor | None = None) -> Plan:
        """Return the plan of a boolean block mask ``keep [B|1, H|1, Qb, Qb]``.

        Raises:
            ValueError: the mask has another shape, or a row is empty.
        """
        blocks = num_blocks(tokens, block)
        if keep.ndim != 4 or keep.shape[-2:] != (blocks, blocks):
            shape = f"[B, H, {blocks}, {blocks}]"
            raise ValueError(f"{tokens} tokens in blocks of {block} need a mask {shape}, got {list(keep.shape)}")
        return cls(*lists_from_mask(keep), tokens, block, order)

    @classmethod
    def by_head(cls, plans: Sequence[Plan], choice: Tensor) -> Plan:
        """Combine plans of the same blocks: head h of item b follows ``plans[choice[b, h]]``. The tail is kept if it is
        the same in all plans.

        Args:
            plans: plans for one head or for all, for one item or for all.
            choice: int64 ``[B|1, H]``.
        """
        batches = [x.shape[0] for plan in plans for x in (plan.index, plan.order) if x is not None and x.ndim > 1]
        lead = (max(choice.shape[0], *batches), choice.shape[1])
        width = max(plan.index.shape[-1] for plan in plans)
        pad = lambda index: torch.cat([index, index[..., :1].expand(*index.shape[:-1], width - index.shape[-1])], -1)
        index = _select_by_head([pad(plan.index) for plan in plans], choice, lead)
        count = _select_by_head([plan.count for plan in plans], choice, lead)
        order = None
        if any(plan.order is not None for plan in plans):
            identity = torch.arange(plans[0].tokens, device=choice.device)
            orders = (identity if plan.order is None else plan.order for plan in plans)
            order = _select_by_head([o.expand(1, 1, -1) if o.ndim == 1 else o for o in orders], choice, lead)
        tails = {plan.tail for plan in plans}
        return cls(index, count, plans[0].tokens, plans[0].block, order, tail=tails.pop() if len(tails) == 1 else None)

    def expand_heads(self, heads: Tensor, total: int) -> Plan:
        """Return the plan of some heads, ``heads [H']``, for all ``total`` heads of a layer.

        The other heads get the lists of the first one, as a filler.
        """
        source = torch.zeros(total, dtype=torch.long, device=self.index.device)
        source[heads] = torch.arange(len(heads), device=source.device)
        expand = lambda x: x if x is None or x.ndim == 1 or x.shape[1] == 1 else x.index_select(1, source)
        return replace(self, index=expand(self.index), count=expand(self.count), order=expand(self.order))

    @classmethod
    def dense(cls, tokens: int, block: int, device: torch.device | str = "cpu") -> Plan:
        """Return the plan that computes all pairs."""
        first = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=device)
        return cls(first, first[..., 0] + 1, tokens, block).full()

    @property
    def blocks(self) -> int:
        """Number of blocks, Qb."""
        return num_blocks(self.tokens, self.block)

    @property
    def query_sizes(self) -> Tensor:
        """Tokens in each block, int64 ``[1, 1, Qb]``."""
        starts = torch.arange(self.blocks, device=self.index.device) * self.block
        return (self.tokens - starts).clamp(max=self.block)[None, None]

    key_sizes = query_sizes

    @property
    def query_group(self) -> Tensor:
        """Block of every token, int64 ``[B|1, H|1, N]``."""
        position = torch.arange(self.tokens, device=self.index.device)
        if self.order is not None:
            position = self.order.argsort(-1)
        return (position // self.block).expand(1, 1, -1) if position.ndim == 1 else position // self.block

    key_group = query_group

    def arrange(self, x: Tensor) -> Tensor:
        """Return ``x [B, H, N, ...]`` in the plan's order."""
        return reorder(x, self.order)

    def restore(self, x: Tensor) -> Tensor:
        """Return ``x [B, H, N, ...]`` in the order of the input: the inverse of :meth:`arrange`."""
        return x if self.order is None else reorder(x, self.order.argsort(-1))

    def __repr__(self) -> str:
        return self._repr(f"{self.blocks} blocks of {self.block}")


def _select_by_head(values: Sequence[Tensor], choice: Tensor, lead: tuple[int, int]) -> Tensor:
    """Return head h of item b from ``values[choice[b, h]]``, each ``[B|1, H|1, ...]``."""
    shape = (*lead, *values[0].shape[2:])
    number = choice.view(*choice.shape, *(1,) * (len(shape) - 2))
    result = values[0].expand(shape)
    for i, value in enumerate(values[1:], 1):
        result = torch.where(number == i, value, result)
    return result
