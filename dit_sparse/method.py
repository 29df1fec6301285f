"""Base classes of sparse-attention methods. A method decides which blocks of attention are computed.

Each file of ``methods/`` implements one paper. Methods are frozen dataclasses: comparable, hashable and without state,
so pipelines can share them. State between steps lives in the ``memory`` dict, which the run keeps for each layer and
pair of guidance branches; its entry "shared" is one dict for all layers, see `shared_memory`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from .budget import Budget, Top
from .clusters import ClusterPlan
from .density import VideoBlocks, pair_weights
from .grid import BaseGrid, Blocks, Grid, Site
from .notation.settings import check_fields, within
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

    Subclass :class:`dit_sparse.pattern.Pattern` (depends on geometry alone) or :class:`Scorer` (ranks blocks by q and
    k) where possible: both reduce a method to one function.

    Settings are checked against the annotations of the fields, and their ranges if the field is made by `within`.

    Attributes:
        density: fraction of the query-key pairs to compute, those with text included. None: the method's own settings
            decide.
        density_exception: why plans may not meet the density, for reports; None: `dit_sparse.density` holds.
        static: whether the plan depends on the grid alone, so that all layers and steps share it.
        needs_raster: whether the method needs frames, rows and columns without gaps, which voxels do not have.
        depends_on_shape: for static plans, whether frames, height and width matter, or the number of tokens alone.
        manages_own_plans: whether the method is called at every sparse step, instead of when the schedule asks for a
            plan, and decides itself when to make a new one.
        makes_cluster_plans: whether plans are a ``ClusterPlan``.
        keeps_model_attention: whether the model's own attention call runs in all steps.
        needs_values: whether :meth:`plan` reads the values; otherwise it gets None in their place.
        needs_lse: whether :meth:`correct` reads the log-sum-exp, which not all executors return.
        observes_dense: whether :meth:`observe_dense` is called in the last dense step, which costs one more plan and
            one sparse call for each layer and branch, once.
        reuses_outputs: whether the output depends on outputs of earlier steps, so that single calls do not show its
            error.
        density_ramp: how the density changes over the sparse steps, as in `Schedule`; used if the schedule has no ramp.
    """

    density_exception: ClassVar[str | None] = None
    static: ClassVar[bool] = False
    needs_raster: ClassVar[bool] = False
    depends_on_shape: ClassVar[bool] = True
    manages_own_plans: ClassVar[bool] = False
    makes_cluster_plans: ClassVar[bool] = False
    keeps_model_attention: ClassVar[bool] = False
    needs_values: ClassVar[bool] = False
    needs_lse: ClassVar[bool] = False
    observes_dense: ClassVar[bool] = False
    reuses_outputs: ClassVar[bool] = False
    density_ramp: ClassVar[tuple[float, float] | None] = None
    density: float | None = within("(0, 1]", None)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__repr__ = cls.__repr__  # @dataclass generates one unless the class itself has it

    def __post_init__(self) -> None:
        check_fields(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._changed_settings())})"

    def _changed_settings(self) -> Iterator[tuple[str, Any]]:
        """Yield name and value of the settings that differ from their defaults."""
        settings = ((f, getattr(self, f.name)) for f in fields(self))
        return ((f.name, value) for f, value in settings if value != f.default)

    def why_not(self, grid: BaseGrid) -> str | None:
        """Return why the method does not apply to a grid, or None if it does. Inner methods are asked separately, see
        `dit_sparse.composition.check_grid`."""
        if self.needs_raster and not isinstance(grid, Grid):
            return "it needs frames, rows and columns without gaps"
        return None

    def order(self, grid: BaseGrid, block: int) -> Tensor | None:
        """Return the token order that blocks are cut from, ``[N]``; None: the order of the input."""
        return None

    def required(self, grid: Grid, block: int) -> Tensor:
        """Return the blocks that the method keeps at every density: text and the diagonal, bool ``[Qb, Qb]``."""
        return required_blocks(Blocks.from_grid(grid, block, self.order(grid, block)))

    def least_density(self, grid: Grid, block: int) -> float:
        """Return the fraction of the pairs that the method keeps at every density."""
        return float(pair_weights(grid, block)[self.required(grid, block)].sum())

    def density_note(self, grid: Grid, block: int, achieved: float) -> str | None:
        """Return why plans do not have the requested density, or None if they have it to within 0.01."""
        if self.density is None or abs(achieved - self.density) <= 0.01:
            return None
        if self.density_exception:
            return self.density_exception
        least, pair = self.least_density(grid, block), (min(block, grid.tokens) / grid.tokens) ** 2
        if least > self.density:
            return f"what every row keeps, such as text and its own block, is {least:.3f} of the pairs"
        return f"one pair of blocks is {pair:.3f} of all pairs" if pair > 0.01 else "every row keeps at least one group"

    def resolve(self, grid: Grid, block: int) -> Method:
        """Return the method with the settings that give its density on a grid, for methods that solve for settings;
        other methods return themselves."""
        return self

    def check_model(self, layers: int, heads: int) -> None:
        """Raise ValueError if the method does not fit the model. Called when a model is made sparse."""

    def check_transformer(self, classes: tuple[str, ...]) -> None:
        """Raise ValueError if the method is for another transformer than that with these names of its class and base
        classes. Called when a model is made sparse, for every method of a composition."""

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

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Plan | ClusterPlan | None:
        """Return the plan for ``q, k, v [B, H, N, D]`` (q and k after RoPE), or None to compute all pairs.

        ``v`` is None unless the method ``needs_values``.
        """
        raise NotImplementedError

    def correct(self, result: AttentionOutput, site: Site, memory: dict) -> tuple[Tensor, Tensor | None]:
        """Return the final output ``[B, H, N, D]`` and log-sum-exp ``[B, H, N]``; by default those of the executor."""
        return result.out, result.lse

    def observe_dense(self, result: AttentionOutput, site: Site, memory: dict) -> None:
        """Observe a call of the last dense step, if :attr:`observes_dense` is set.

        With guidance it is called for both branches before the first sparse call: once if a batch holds both, else once
        for each. Values stored in ``memory`` are kept for every layer; `begin_generation` returns their size.

        Args:
            result: the output for the method's plan of this call; ``dense()`` returns the output of the dense step,
                without log-sum-exp.
            site: of the dense call.
            memory: that of the sparse calls that follow.
        """

    def settings(self) -> dict:
        """Return the fields as JSON values; a budget or an inner method becomes ``{"Top": {...}}``."""
        return {f.name: _to_json(getattr(self, f.name)) for f in fields(self)}

    def __or__(self, other: Method) -> Method:
        """Return the union of two patterns, which keeps every block that either keeps."""
        from .pattern import Union

        return Union(density=self.density, parts=(replace(self, density=None), other))


def shared_memory(memory: dict) -> dict:
    """Return the part of a method's memory that all layers share, for methods that reuse plans or sums over layers.
    Layers may be on different devices."""
    return memory.setdefault("shared", {})


def nested_memory(memory: dict, name: str) -> dict:
    """Return the memory of an inner method of a composition."""
    if name not in memory:
        memory[name] = {"shared": shared_memory(memory).setdefault(name, {})}
    return memory[name]


def _to_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_to_json(part) for part in value]
    if is_dataclass(value):
        return {type(value).__name__: {f.name: _to_json(getattr(value, f.name)) for f in fields(value)}}
    return value


@dataclass(frozen=True, kw_only=True)
class Scorer(Method):
    """A method that ranks the key blocks of each query block by q and k. Subclasses implement :meth:`score`.

    Blocks with text are always kept and not ranked; of the others, each row keeps its own block.

    Attributes:
        budget: how many of the blocks without text to keep. None: the best blocks up to the density, or
            ``default_budget`` without a density.
        default_budget: the authors' budget.
        selects_by_head: whether a density sets one threshold for all rows of a head, which then keep different numbers
            of blocks; otherwise rows keep the same number.
    """

    default_budget: ClassVar[Budget] = Top(0.25)
    selects_by_head: ClassVar[bool] = False
    budget: Budget | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density is not None and self.budget is not None:
            raise ValueError("give a density or a budget, not both")

    def score(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Tensor:
        """Return float32 scores ``[B, H, Qb, Qb]`` of ``q, k, v [B, H, N, D]``, which are in the method's order.

        Scores are logits, because ``Mass`` takes their softmax. Blocks of +inf are kept in addition to the budget.
        """
        raise NotImplementedError

    def paper_budget(self, blocks: VideoBlocks) -> Budget:
        """Return the authors' budget for these blocks, for budgets that depend on their number."""
        return self.default_budget

    def blocks(self, site: Site, device: torch.device) -> VideoBlocks:
        """Return the blocks without text, which the scorer ranks, in its order."""
        return _cached_order(self, site.grid, site.block, device)[1]

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Plan:
        order, blocks = _cached_order(self, site.grid, site.block, q.device)
        if order is not None:
            q, k, v = (None if x is None else x.index_select(2, order) for x in (q, k, v))
        groups = q.shape[1] // k.shape[1]
        k, v = (None if x is None else x.repeat_interleave(groups, 1) for x in (k, v))
        scores = self.score(q, k, v, site, memory).float()
        if self.density is None:
            budget = self.budget or self.paper_budget(blocks)
            keep = blocks.choose(scores, lambda scores: budget.keep(scores, blocks.own))
        else:
            pairs = blocks.pairs(self.density)
            select = blocks.keep_by_head if self.selects_by_head else blocks.keep_at
            keep = blocks.choose(scores, lambda scores: select(scores, pairs))
        return Plan.from_mask(keep, site.grid.tokens, site.block, order)


@lru_cache(maxsize=16)
def _cached_order(scorer: Scorer, grid: Grid, block: int, device: torch.device) -> tuple[Tensor | None, VideoBlocks]:
    """Order of a scorer and the blocks that it ranks, so that they are copied to the device once."""
    order = scorer.order(grid, block)
    blocks = VideoBlocks.from_grid(grid, block, order).to(device)
    return order if order is None else order.to(device), blocks


def required_blocks(blocks: Blocks) -> Tensor:
    """Return the blocks that every method keeps, bool ``[Qb, Qb]``: rows and columns with text, and the diagonal."""
    text = blocks.text
    return text[:, None] | text | torch.eye(len(text), dtype=torch.bool)
