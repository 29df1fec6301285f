"""Compositions of methods: wrappers, plans reused over steps, and a method for each head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .grid import BaseGrid, Grid, Site, short_repr
from .kernels.tail import add_tail
from .method import AttentionOutput, Method, nested_memory
from .notation.settings import within
from .pattern import Union
from .plan import Plan
from .scoring import QueryDrift, pool


@dataclass(frozen=True, kw_only=True)
class Wrapper(Method):
    """Base class of methods that wrap another method. The inner method makes the plans and has the density.

    Attributes:
        inner: the method that makes the plans.
    """

    inner: Method

    def __post_init__(self) -> None:
        super().__post_init__()
        density = self.inner.density if self.density is None else self.density
        object.__setattr__(self, "density", density)
        object.__setattr__(self, "inner", replace(self.inner, density=density))

    def _changed_settings(self) -> Iterator[tuple[str, Any]]:
        default = getattr(type(self), "inner", None)
        is_default = isinstance(default, Method) and self.inner == replace(default, density=self.density)
        redundant = "inner" if is_default else "density"
        return (setting for setting in super()._changed_settings() if setting[0] != redundant)

    @property
    def density_exception(self) -> str | None:
        return self.inner.density_exception

    @property
    def static(self) -> bool:
        return self.inner.static

    @property
    def manages_own_plans(self) -> bool:
        return self.inner.manages_own_plans

    @property
    def makes_cluster_plans(self) -> bool:
        return self.inner.makes_cluster_plans

    @property
    def needs_values(self) -> bool:
        return self.inner.needs_values

    @property
    def needs_lse(self) -> bool:
        return self.inner.needs_lse

    @property
    def observes_dense(self) -> bool:
        return self.inner.observes_dense

    @property
    def density_ramp(self) -> tuple[float, float] | None:
        return self.inner.density_ramp

    def required(self, grid: Grid, block: int) -> Tensor:
        return self.inner.required(grid, block)

    def least_density(self, grid: Grid, block: int) -> float:
        return self.inner.least_density(grid, block)

    def resolve(self, grid: Grid, block: int) -> Method:
        inner = self.inner.resolve(grid, block)
        return self if inner is self.inner else replace(self, inner=inner, density=None)

    def check_model(self, layers: int, heads: int) -> None:
        self.inner.check_model(layers, heads)

    def begin_generation(self, q: Tensor, site: Site, reserved_bytes: int = 0) -> int:
        return self.inner.begin_generation(q, site, reserved_bytes)

    def order(self, grid: Grid, block: int) -> Tensor | None:
        return self.inner.order(grid, block)

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Plan | None:
        return self.inner.plan(q, k, v, site, nested_memory(memory, "inner"))

    def correct(self, result: AttentionOutput, site: Site, memory: dict) -> tuple[Tensor, Tensor | None]:
        return self.inner.correct(result, site, nested_memory(memory, "inner"))

    def observe_dense(self, result: AttentionOutput, site: Site, memory: dict) -> None:
        self.inner.observe_dense(result, site, nested_memory(memory, "inner"))


@dataclass(frozen=True, kw_only=True)
class Correction(Wrapper):
    """Base class of wrappers that change the attention output, by :meth:`correct` or by the tail of the plan."""

    needs_lse = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if changes_output(self.inner):
            raise ValueError(f"{type(self).__name__} and {type(self.inner).__name__} would both correct the output")


def changes_output(method: Method) -> bool:
    """Return whether a method changes the attention output."""
    if isinstance(method, PerHead):
        return any(changes_output(part) for _, part in method.methods)
    if isinstance(method, Wrapper) and not isinstance(method, Correction):
        return changes_output(method.inner)
    return isinstance(method, Correction) or type(method).correct is not Method.correct


def map_density(method: Method, change: Callable[[float], float]) -> Method:
    """Return a method with changed densities; those of `PerHead` are the densities of its methods."""
    if isinstance(method, Wrapper):
        return replace(method, inner=map_density(method.inner, change), density=None)
    if isinstance(method, PerHead):
        return replace(method, methods=tuple((letter, map_density(part, change)) for letter, part in method.methods))
    return method if method.density is None else replace(method, density=change(method.density))


def nested_methods(method: Method) -> Iterator[Method]:
    """Yield a method and all methods inside it."""
    yield method
    parts: tuple[Method, ...] = ()
    if isinstance(method, Wrapper):
        parts = (method.inner,)
    elif isinstance(method, Union):
        parts = method.parts
    elif isinstance(method, PerHead):
        parts = tuple(part for _, part in method.methods)
    for part in parts:
        yield from nested_methods(part)


def check_grid(method: Method, grid: BaseGrid) -> None:
    """Raise ValueError if a method, or a method inside it, does not apply to a grid."""
    for part in nested_methods(method):
        if reason := part.why_not(grid):
            raise ValueError(f"{type(part).__name__} does not apply to {grid}: {reason}")


@dataclass(frozen=True, kw_only=True)
class Cached(Wrapper):
    """Keeps the plan of another method over several steps, or until the queries drift.

    Source of the drift rule: W. Wu et al., "TokenSelect", arXiv:2411.02886, who reuse a selection while the cosine
    similarity to the query that it was made for exceeds a threshold. Here the queries are means of blocks.

    Attributes:
        replan_interval: largest number of steps between two plans; None: no limit.
        drift: new plan if 1 - cosine similarity, averaged over blocks, exceeded this at the previous call; None: no
            limit.
    """

    static = False
    manages_own_plans = True
    replan_interval: int | None = within("[1, 10000]", None)
    drift: float | None = within("[0, 2]", None)

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Plan | None:
        means = None if self.drift is None else pool(q, site.block)
        if "plan" not in memory or self._is_stale(means, site, memory):
            drift = None if means is None else QueryDrift(means)
            memory.update(plan=super().plan(q, k, v, site, memory), step=site.step, drift=drift)
        return memory["plan"]

    def _is_stale(self, means: Tensor | None, site: Site, memory: dict) -> bool:
        if self.replan_interval is not None and site.step - memory["step"] >= self.replan_interval:
            return True
        return means is not None and memory["drift"].exceeds(self.drift, means)


@dataclass(frozen=True, kw_only=True)
class PerHead(Method):
    """A method for each head, computed in one launch, as a profile describes it.

    Attributes:
        methods: pairs of a letter and a method. Methods that make cluster plans are not allowed, because clusters and
            blocks cannot share a launch.
        layers: for each layer a string with the letter of each head.
        profile: name or path of the profile, for reports.
    """

    methods: tuple[tuple[str, Method], ...]
    layers: tuple[str, ...]
    profile: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        letters = [letter for letter, _ in self.methods]
        if cluster := next((type(part).__name__ for _, part in self.methods if part.makes_cluster_plans), None):
            raise ValueError(f"{cluster} makes clusters, which cannot share a launch with the blocks of other heads")
        if self.density is not None:
            raise ValueError("PerHead takes no density: set the density of its methods")
        if len(set(letters)) < len(letters) or any(len(letter) != 1 for letter in letters):
            raise ValueError(f"each method needs a letter of its own, got {short_repr(letters)}")
        if unknown := set("".join(self.layers)) - set(letters):
            raise ValueError(f"layers contain the unknown letters {sorted(unknown)}; the methods are {letters}")
        if not self.layers:
            raise ValueError("layers must hold at least one layer")

    def __repr__(self) -> str:
        name = f"{self.profile}: " if self.profile else ""
        heads = len(self.layers[0])
        return f"PerHead({name}{len(self.methods)} methods, {len(self.layers)} layers of {heads} heads)"

    @property
    def manages_own_plans(self) -> bool:
        return any(method.manages_own_plans for _, method in self.methods)

    @property
    def needs_values(self) -> bool:
        return any(method.needs_values for _, method in self.methods)

    @property
    def needs_lse(self) -> bool:
        return any(method.needs_lse for _, method in self.methods)

    def check_model(self, layers: int, heads: int) -> None:
        if layers != len(self.layers):
            raise ValueError(f"made for {len(self.layers)} layers of self-attention, but the model has {layers}")
        if wrong := [len(line) for line in self.layers if len(line) != heads]:
            raise ValueError(f"made for {wrong[0]} heads per layer, but the model has {heads}")
        for _, method in self.methods:
            method.check_model(layers, heads)

    def begin_generation(self, q: Tensor, site: Site, reserved_bytes: int = 0) -> int:
        own_bytes = 0
        for _, method in self.methods:
            own_bytes += method.begin_generation(q, site, reserved_bytes + own_bytes)
        return own_bytes

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Plan:
        letters = self._letters(q, site)
        k, v = (None if x is None else x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        plans, choice = [], torch.zeros(1, len(letters), dtype=torch.long, device=q.device)
        for letter, method in self._methods_in(letters):
            numbers = [head for head, own in enumerate(letters) if own == letter]
            heads = torch.tensor(numbers, device=q.device)
            own = (None if x is None else x[:, heads] for x in (q, k, v))
            own_site = replace(site, heads=tuple((site.first_head or 0) + head for head in numbers))
            plan = self._plan_heads(method, *own, own_site, nested_memory(memory, letter))
            choice[:, heads] = len(plans)
            plans.append(plan.expand_heads(heads, len(letters)))
        return Plan.by_head(plans, choice)

    def correct(self, result: AttentionOutput, site: Site, memory: dict) -> tuple[Tensor, Tensor | None]:
        letters, (out, lse) = self._letters(result.q, site), (result.out, result.lse)
        for letter, method in self._methods_in(letters):
            if changes_output(method):
                mine = torch.tensor([own == letter for own in letters], device=out.device)[:, None]
                own_result = self._with_tail(result, memory[letter]["part"].tail)
                corrected, corrected_lse = method.correct(own_result, site, memory[letter])
                out = torch.where(mine[..., None], corrected, out)
                lse = lse if lse is None or corrected_lse is None else torch.where(mine, corrected_lse, lse)
        return out, lse

    @staticmethod
    def _with_tail(result: AttentionOutput, tail: int | None) -> AttentionOutput:
        """Return the result with the pooled tail added, for heads whose tail was left out because the tails of the
        heads differ."""
        if tail == result.plan.tail:
            return result
        tensors = result.q, result.k, result.v, result.plan.with_tail(tail), result.scale
        out, lse = add_tail(result.out, result.lse, *tensors)
        return replace(result, out=out, lse=lse)

    def _plan_heads(self, method: Method, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Plan:
        """Return the plan of the heads of one letter, a new one if the schedule asks for it."""
        if "part" not in memory or method.manages_own_plans or site.needs_plan:
            plan = method.plan(q, k, v if method.needs_values else None, site, memory)
            memory["part"] = Plan.dense(site.grid.tokens, site.block, q.device) if plan is None else plan
        return memory["part"]

    def _methods_in(self, letters: str) -> list[tuple[str, Method]]:
        return [(letter, method) for letter, method in self.methods if letter in letters]

    def _letters(self, q: Tensor, site: Site) -> str:
        """Return the letter of each head of the layer."""
        if site.first_head is None:
            self.check_model(site.layers, q.shape[1])
        return self.layers[site.layer][site.first_head or 0 :][: q.shape[1]]
