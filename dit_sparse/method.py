"""A method decides which blocks of attention are computed. One file of ``methods/`` holds one paper.

Methods are frozen values: comparable, hashable, shareable between pipelines, and without state. What they want to
remember from step to step goes into the ``memory`` they are handed, which belongs to the run: one for every layer and
pair of branches of guidance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from .budget import Budget, Top, check_density
from .clusters import ClusterPlan
from .grid import Blocks, Grid, Site
from .plan import Plan, num_blocks


@dataclass(frozen=True)
class AttentionOutput:
    """A sparse call as an executor computed it, for a method that wants the last word.

    Attributes:
        q, k, v: ``[B, H, N, D]``, and ``[B, Hkv, N, D]`` twice.
        plan, scale: what the executor was told.
        out, lse: what it returned, ``[B, H, N, D]`` and float32 ``[B, H, N]``; lse None where it has none.
        dense: computes the same call densely, by the same executor: ``(out, lse)``. A run counts these pairs too.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    plan: Plan | ClusterPlan
    scale: float | None
    out: Tensor
    lse: Tensor | None
    dense: Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What every method answers. Subclass :class:`Pattern` (geometry alone) or :class:`Scorer` (looks at q and k)
    where one of them fits; they reduce a method to one function.

    Attributes:
        density: fraction of the query-key pairs to compute. None: the method's own settings decide.
    """

    static: ClassVar[bool] = False  # the plan depends on the grid alone: made once, shared by all layers and steps
    manages_own_plans: ClassVar[bool] = False  # it keeps plans itself, and is asked at every step, not by the schedule
    clusters: ClassVar[bool] = False  # its plans are between clusters of any size
    keeps_model_attention: ClassVar[bool] = (
        False  # the model's own call runs in all steps: what others are compared with
    )
    needs_lse: ClassVar[bool] = False  # the correction asks for the log-sum-exp, which not all executors return
    density: float | None = None

    def __post_init__(self) -> None:
        if self.density is not None:
            check_density(self.density)

    def order(self, grid: Grid, block: int) -> Tensor | None:
        """The token order the blocks are cut from, ``[N]``; None: as given."""
        return None

    def check_model(self, layers: int, heads: int) -> None:
        """Called when a model is made sparse. Raises ValueError where the method is made for another one."""

    def begin_generation(self, q: Tensor, site: Site, reserved_bytes: int = 0) -> int:
        """Prepare for a generation. Called at the first attention call of each branch, dense or sparse.

        Args:
            reserved_bytes: memory that other branches have reserved.

        Returns:
            Bytes that the method will keep for this branch.

        Raises:
            RuntimeError: the generation would fail later, for example for lack of memory."""
        return 0

    def plan(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Plan | ClusterPlan | None:
        """The blocks to visit for ``q, k [B, H, N, D]`` (after RoPE); None: compute this call densely."""
        raise NotImplementedError

    def correct(self, done: AttentionOutput, site: Site, memory: dict) -> tuple[Tensor, Tensor | None]:
        """A last word on what was computed: out ``[B, H, N, D]`` and lse ``[B, H, N]``; by default none."""
        return done.out, done.lse

    def settings(self) -> dict:
        """The method as plain values, for JSON: its fields, nothing else. A budget becomes ``{"Top": {...}}``, a
        method inside it likewise."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def __or__(self, other: Method) -> Union:
        """All that either of two patterns keeps."""
        return Union(density=self.density, parts=(replace(self, density=None), other))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    if is_dataclass(value):
        return {type(value).__name__: {f.name: _plain(getattr(value, f.name)) for f in fields(value)}}
    return value


@dataclass(frozen=True, kw_only=True)
class Pattern(Method):
    """A method that depends on the geometry alone. A subclass writes :meth:`keep`; one knob makes it denser.

    With ``density`` the knob is found by bisection, and of the last ring of blocks that the knob would add as one, the
    nearest are taken, evenly over the rows, until the density is met.
    """

    static: ClassVar[bool] = True
    knob: ClassVar[str]  # the field that widens the pattern
    knob_range: ClassVar[tuple[float, float]]  # the knob's range: from almost nothing to everything

    def keep(self, grid: Grid, block: int) -> Tensor:
        """The pattern itself: which key blocks each query block visits, bool ``[Qb, Qb]``."""
        raise NotImplementedError

    def narrower(self) -> Pattern | None:
        """A sparser relative for densities below the knob's range, or None."""
        return None

    def plan(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Plan:
        return _planned(self, site.grid, site.block).to(q.device)

    def block_map(self, grid: Grid, block: int) -> Tensor:
        """The pattern with what is always kept, at the density asked for, bool ``[Qb, Qb]``."""
        always = required_blocks(Blocks.from_grid(grid, block, self.order(grid, block)))
        if self.density is None:
            return self.keep(grid, block) | always
        weight = _pair_weight(grid, block)
        measure = lambda keep: float(weight[keep].sum())
        family, low = self, self.knob_range[0]
        while measure(family._at(low, grid, block) | always) > self.density and (relative := family.narrower()):
            family = relative
        inner, outer = _bracket(lambda x: family._at(x, grid, block) | always, measure, self.density, self.knob_range)
        return _fill(inner if inner is not None else always, outer, weight, self.density)

    def _at(self, value: float, grid: Grid, block: int) -> Tensor:
        return replace(self, density=None, **{self.knob: value}).keep(grid, block)


@dataclass(frozen=True, kw_only=True)
class Scorer(Method):
    """A method that ranks the key blocks of each query block by looking at q and k. A subclass writes :meth:`score`.

    Attributes:
        budget: how many of the ranked blocks survive; None: ``Top(density)``; without a density the authors', or
            ``Top(0.25)``.
    """

    default_budget: ClassVar[Budget] = Top(0.25)
    budget: Budget | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and not isinstance(self.budget, Budget):
            raise ValueError(f"a budget is Top, Mass or Above, not {self.budget!r}")
        if self.density is not None and self.budget is not None:
            raise ValueError("give a density or a budget, not both: a density is short for the budget Top(density)")

    def score(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Tensor:
        """Float32 scores ``[B, H, Qb, Qb]`` of ``q, k [B, H, N, D]``, which stand in the method's order. Logits: their
        softmax is what a budget of mass adds up. +inf is kept whatever the budget."""
        raise NotImplementedError

    def plan(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Plan:
        order, always = _cut(self, site.grid, site.block, q.device)
        if order is not None:
            q, k = (x.index_select(2, order) for x in (q, k))
        scores = self.score(q, k.repeat_interleave(q.shape[1] // k.shape[1], 1), site, memory).float()
        budget = self.budget or (self.default_budget if self.density is None else Top(self.density))
        return Plan.from_mask(budget.keep(scores.masked_fill(always, torch.inf)), site.grid.tokens, site.block, order)


@dataclass(frozen=True, kw_only=True)
class Union(Pattern):
    """All that any of some patterns keeps: ``Radial() | Sink()``. A density widens the first one, and the others stay
    where they leave room for it."""

    parts: tuple[Pattern, ...] = field(default=())

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts or not all(isinstance(part, Pattern) for part in self.parts):
            raise ValueError("only patterns, which know the geometry alone, can be united with |")
        self.order(Grid(2, 2, 2), 16)

    @property
    def knob_range(self) -> tuple[float, float]:
        return self.parts[0].knob_range

    def order(self, grid: Grid, block: int) -> Tensor | None:
        first, *others = (part.order(grid, block) for part in self.parts)
        same = lambda other: other is first or (first is not None and other is not None and first.equal(other))
        if not all(map(same, others)):
            raise ValueError("patterns that cut their blocks from different token orders cannot be united")
        return first

    def keep(self, grid: Grid, block: int) -> Tensor:
        return self._with_others(self.parts[0].block_map(grid, block), grid, block)

    def narrower(self) -> Union | None:
        relative = self.parts[0].narrower()
        return relative and replace(self, parts=(relative, *self.parts[1:]))

    def _at(self, value: float, grid: Grid, block: int) -> Tensor:
        return self._with_others(self.parts[0]._at(value, grid, block), grid, block)

    def _with_others(self, first: Tensor, grid: Grid, block: int) -> Tensor:
        others = (_mapped(part, grid, block) for part in self.parts[1:])
        return torch.stack([first, *others]).any(0)


@lru_cache(maxsize=4)
def _mapped(pattern: Pattern, grid: Grid, block: int) -> Tensor:
    """The fixed parts of a union, which bisecting its knob asks for again and again."""
    return pattern.block_map(grid, block)


@lru_cache(maxsize=16)
def _planned(pattern: Pattern, grid: Grid, block: int) -> Plan:
    """One for all layers, also where a pattern is a part of something that is planned layer by layer."""
    keep = pattern.block_map(grid, block)
    return Plan.from_mask(keep[None, None], grid.tokens, block, pattern.order(grid, block))


@lru_cache(maxsize=16)
def _cut(scorer: Scorer, grid: Grid, block: int, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """The order that a scorer cuts its blocks from, and which of them are always kept: the same at every plan, so they
    are copied to the device once."""
    order = scorer.order(grid, block)
    always = required_blocks(Blocks.from_grid(grid, block, order)).to(device)
    return order if order is None else order.to(device), always


def required_blocks(blocks: Blocks) -> Tensor:
    """Text rows and columns and each block's own block, bool ``[Qb, Qb]``: what no method may drop."""
    text = blocks.text
    return text[:, None] | text | torch.eye(len(text), dtype=torch.bool)


def _pair_weight(grid: Grid, block: int) -> Tensor:
    """Share of all token pairs that lies in each block pair, float64 ``[Qb, Qb]``, in sum 1."""
    starts = torch.arange(num_blocks(grid.tokens, block)) * block
    size = (grid.tokens - starts).clamp(max=block).double() / grid.tokens
    return size[:, None] * size


def _bracket(
    keep: Callable[[float], Tensor],
    measure: Callable[[Tensor], float],
    density: float,
    knob_range: tuple[float, float],
) -> tuple[Tensor | None, Tensor]:
    """The densest pattern within ``density`` (None: even the sparsest exceeds it) and the next one beyond."""
    low, high = knob_range
    inner, outer = keep(low), keep(high)
    if measure(inner) > density:
        return None, inner
    if measure(outer) <= density:
        return outer, torch.ones_like(outer)
    while measure(outer) - density > 1e-3 and high / low > 1 + 1e-6:
        middle = (low * high) ** 0.5
        candidate = keep(middle)
        if measure(candidate) <= density:
            low, inner = middle, candidate
        else:
            high, outer = middle, candidate
    return inner, outer


def _fill(inner: Tensor, outer: Tensor, weight: Tensor, density: float) -> Tensor:
    """``inner`` and as many pairs of ``outer`` as the density allows: nearest first, evenly over the rows."""
    extra = outer & ~inner
    place = torch.arange(len(inner))
    distance = (place[:, None] - place).abs().masked_fill(~extra, len(inner))
    turn = distance.argsort(dim=1, stable=True).argsort(dim=1)
    candidates = extra.nonzero()
    first = candidates[turn[extra].argsort(stable=True)]
    rows, columns = first.unbind(1)
    fits = weight[rows, columns].cumsum(0) <= density - float(weight[inner].sum()) + 1e-9
    keep = inner.clone()
    keep[rows[fits], columns[fits]] = True
    return keep
