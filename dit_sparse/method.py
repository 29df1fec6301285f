"""Base classes of sparse-attention methods: a method decides which blocks of attention are computed.

Each file of ``methods/`` implements one paper. Methods are frozen dataclasses: comparable, hashable and without state,
so pipelines can share them. State between steps lives in the ``memory`` dict, which the run keeps for each layer and
pair of guidance branches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from .budget import Budget, Top, check_density
from .clusters import ClusterPlan
from .density import meet_density, pair_weights
from .grid import Blocks, Grid, Site
from .plan import Plan


@dataclass(frozen=True)
class AttentionOutput:
    """Inputs and output of one sparse attention call, for methods that correct the output.

    Attributes:
        q, k, v: ``[B, H, N, D]``, ``[B, Hkv, N, D]``, ``[B, Hkv, N, D]``.
        plan: the blocks that were computed.
        scale: factor of the scores; None: ``1 / sqrt(D)``.
        out: output, ``[B, H, N, D]``.
        lse: natural log-sum-exp of the scores, float32 ``[B, H, N]``; None if the executor returns none.
        dense: computes all pairs by the same executor and returns ``(out, lse)``; a run counts these pairs, too.
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
    """Base class of all methods.

    Subclass :class:`Pattern` (depends on geometry alone) or :class:`Scorer` (ranks blocks by q and k) where possible:
    both reduce a method to one function.

    Attributes:
        density: fraction of the query-key pairs to compute. None: the method's own settings decide.
        static: whether the plan depends on the grid alone, so that all layers and steps share it.
        depends_on_shape: for static plans, whether frames, height and width matter, or the number of tokens alone.
        manages_own_plans: whether the method is called at every sparse step, instead of when the schedule asks for a
            plan, and decides itself when to make a new one.
        makes_cluster_plans: whether plans are a ``ClusterPlan``.
        keeps_model_attention: whether the model's own attention call runs in all steps.
        needs_lse: whether :meth:`correct` reads the log-sum-exp, which not all executors return.
    """

    static: ClassVar[bool] = False
    depends_on_shape: ClassVar[bool] = True
    manages_own_plans: ClassVar[bool] = False
    makes_cluster_plans: ClassVar[bool] = False
    keeps_model_attention: ClassVar[bool] = False
    needs_lse: ClassVar[bool] = False
    density: float | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__repr__ = cls.__repr__  # @dataclass generates one unless the class itself has it

    def __post_init__(self) -> None:
        if self.density is not None:
            check_density(self.density)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._changed_settings())})"

    def _changed_settings(self) -> Iterator[tuple[str, Any]]:
        """Yield name and value of the settings that differ from their defaults."""
        settings = ((f, getattr(self, f.name)) for f in fields(self))
        return ((f.name, value) for f, value in settings if value != f.default)

    def order(self, grid: Grid, block: int) -> Tensor | None:
        """Return the token order that blocks are cut from, ``[N]``; None: the order of the input."""
        return None

    def check_model(self, layers: int, heads: int) -> None:
        """Raise ValueError if the method is made for another model. Called when a model is made sparse."""

    def begin_generation(self, q: Tensor, site: Site, reserved_bytes: int = 0) -> int:
        """Prepare for a generation. Called at the first attention call of each branch, dense or sparse.

        Args:
            reserved_bytes: memory that other branches have reserved.

        Returns:
            Bytes that the method will keep for this branch.

        Raises:
            RuntimeError: the generation would fail later, for example for lack of memory.
        """
        return 0

    def plan(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Plan | ClusterPlan | None:
        """Return the plan for ``q, k [B, H, N, D]`` (after RoPE), or None to compute all pairs."""
        raise NotImplementedError

    def correct(self, result: AttentionOutput, site: Site, memory: dict) -> tuple[Tensor, Tensor | None]:
        """Return the final output ``[B, H, N, D]`` and log-sum-exp ``[B, H, N]``; by default those of the executor."""
        return result.out, result.lse

    def settings(self) -> dict:
        """Return the fields as JSON values; a budget or an inner method becomes ``{"Top": {...}}``."""
        return {f.name: _to_json(getattr(self, f.name)) for f in fields(self)}

    def __or__(self, other: Method) -> Union:
        """Unite two patterns: keep every block that either keeps."""
        return Union(density=self.density, parts=(replace(self, density=None), other))


def _to_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_to_json(part) for part in value]
    if is_dataclass(value):
        return {type(value).__name__: {f.name: _to_json(getattr(value, f.name)) for f in fields(value)}}
    return value


@dataclass(frozen=True, kw_only=True)
class Pattern(Method):
    """A method that depends on geometry alone. Subclasses implement :meth:`keep` and name the setting that widens it.

    With ``density`` the knob is found by bisection, see :func:`dit_sparse.density.meet_density`.

    Attributes:
        knob: name of the field that widens the pattern.
        knob_range: least and greatest value of the knob, from almost no blocks to all.
    """

    static: ClassVar[bool] = True
    knob: ClassVar[str]
    knob_range: ClassVar[tuple[float, float]]

    def keep(self, grid: Grid, block: int) -> Tensor:
        """Return which key blocks each query block attends to, bool ``[Qb, Qb]``."""
        raise NotImplementedError

    def narrower(self) -> Pattern | None:
        """Return a variant for densities below the range of the knob, or None."""
        return None

    def plan(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Plan:
        return _cached_plan(self, site.grid, site.block).to(q.device)

    def block_mask(self, grid: Grid, block: int) -> Tensor:
        """Return the pattern with the required blocks, at the density if one is given, bool ``[Qb, Qb]``."""
        required = required_blocks(Blocks.from_grid(grid, block, self.order(grid, block)))
        if self.density is None:
            return self.keep(grid, block) | required
        weights = pair_weights(grid, block)
        keep_at = lambda pattern, value: pattern._at(value, grid, block) | required
        pattern, low = self, self.knob_range[0]
        while weights[keep_at(pattern, low)].sum() > self.density and (variant := pattern.narrower()):
            pattern = variant
        return meet_density(partial(keep_at, pattern), self.knob_range, required, weights, self.density)

    def _at(self, value: float, grid: Grid, block: int) -> Tensor:
        """Return the pattern with another value of the knob."""
        return replace(self, density=None, **{self.knob: value}).keep(grid, block)


@dataclass(frozen=True, kw_only=True)
class Scorer(Method):
    """A method that ranks the key blocks of each query block by q and k. Subclasses implement :meth:`score`.

    Attributes:
        budget: how many of the ranked blocks to keep. None: ``Top(density)``, or ``default_budget`` without a density.
        default_budget: the authors' budget.
    """

    default_budget: ClassVar[Budget] = Top(0.25)
    budget: Budget | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and not isinstance(self.budget, Budget):
            raise ValueError(f"budget must be Top, Mass or Above, got {self.budget!r}")
        if self.density is not None and self.budget is not None:
            raise ValueError("give a density or a budget, not both: density=0.2 means budget=Top(0.2)")

    def score(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Tensor:
        """Return float32 scores ``[B, H, Qb, Qb]`` of ``q, k [B, H, N, D]``, which are in the method's order.

        Scores are logits, because ``Mass`` takes their softmax. +inf is always kept.
        """
        raise NotImplementedError

    def plan(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Plan:
        order, required = _cached_order(self, site.grid, site.block, q.device)
        if order is not None:
            q, k = (x.index_select(2, order) for x in (q, k))
        scores = self.score(q, k.repeat_interleave(q.shape[1] // k.shape[1], 1), site, memory).float()
        budget = self.budget or (self.default_budget if self.density is None else Top(self.density))
        return Plan.from_mask(budget.keep(scores.masked_fill(required, torch.inf)), site.grid.tokens, site.block, order)


@dataclass(frozen=True, kw_only=True)
class Union(Pattern):
    """Union of patterns, ``Radial() | Sink()``: keeps every block that any of them keeps.

    A density widens the first pattern; the others keep their settings.

    Attributes:
        parts: the patterns; all must use the same token order.
    """

    parts: tuple[Pattern, ...] = field(default=())

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts or not all(isinstance(part, Pattern) for part in self.parts):
            raise ValueError("only patterns, which depend on geometry alone, can be united with |")
        self.order(Grid(2, 2, 2), 16)

    @property
    def knob_range(self) -> tuple[float, float]:
        return self.parts[0].knob_range

    def order(self, grid: Grid, block: int) -> Tensor | None:
        first, *others = (part.order(grid, block) for part in self.parts)
        same = lambda other: other is first or (first is not None and other is not None and first.equal(other))
        if not all(map(same, others)):
            raise ValueError("patterns with different token orders cannot be united")
        return first

    def keep(self, grid: Grid, block: int) -> Tensor:
        return self._with_others(self.parts[0].block_mask(grid, block), grid, block)

    def narrower(self) -> Union | None:
        variant = self.parts[0].narrower()
        return variant and replace(self, parts=(variant, *self.parts[1:]))

    def _at(self, value: float, grid: Grid, block: int) -> Tensor:
        return self._with_others(self.parts[0]._at(value, grid, block), grid, block)

    def _with_others(self, first: Tensor, grid: Grid, block: int) -> Tensor:
        others = (_cached_mask(part, grid, block) for part in self.parts[1:])
        return torch.stack([first, *others]).any(0)


@lru_cache(maxsize=4)
def _cached_mask(pattern: Pattern, grid: Grid, block: int) -> Tensor:
    """Mask of a fixed part of a union, which every step of the bisection needs."""
    return pattern.block_mask(grid, block)


@lru_cache(maxsize=16)
def _cached_plan(pattern: Pattern, grid: Grid, block: int) -> Plan:
    """Plan of a pattern, shared by all layers even if the pattern is part of a method that is not static."""
    keep = pattern.block_mask(grid, block)
    return Plan.from_mask(keep[None, None], grid.tokens, block, pattern.order(grid, block))


@lru_cache(maxsize=16)
def _cached_order(scorer: Scorer, grid: Grid, block: int, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """Order and required blocks of a scorer, so that they are copied to the device once."""
    order = scorer.order(grid, block)
    required = required_blocks(Blocks.from_grid(grid, block, order)).to(device)
    return order if order is None else order.to(device), required


def required_blocks(blocks: Blocks) -> Tensor:
    """Return the blocks that every method keeps, bool ``[Qb, Qb]``: rows and columns with text, and the diagonal."""
    text = blocks.text
    return text[:, None] | text | torch.eye(len(text), dtype=torch.bool)
