"""Methods made of methods: around one, from step to step, head by head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .grid import Grid, Site
from .method import AttentionOutput, Method, Union
from .plan import Plan
from .scoring import pool


@dataclass(frozen=True, kw_only=True)
class Wrapper(Method):
    """A method that adds something to another one. A density given here is that of the inner one.

    Attributes:
        inner: the method that plans.
    """

    inner: Method

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.inner, Method):
            raise ValueError(f"inner is a dit_sparse.Method, not {type(self.inner).__name__}")
        density = self.inner.density if self.density is None else self.density
        object.__setattr__(self, "density", density)
        object.__setattr__(self, "inner", replace(self.inner, density=density))

    @property
    def static(self) -> bool:
        return self.inner.static

    @property
    def manages_own_plans(self) -> bool:
        return self.inner.manages_own_plans

    @property
    def clusters(self) -> bool:
        return self.inner.clusters

    @property
    def needs_lse(self) -> bool:
        return self.inner.needs_lse

    def check_model(self, layers: int, heads: int) -> None:
        self.inner.check_model(layers, heads)

    def begin_generation(self, q: Tensor, site: Site, reserved_bytes: int = 0) -> int:
        return self.inner.begin_generation(q, site, reserved_bytes)

    def order(self, grid: Grid, block: int) -> Tensor | None:
        return self.inner.order(grid, block)

    def plan(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Plan | None:
        return self.inner.plan(q, k, site, memory.setdefault("inner", {}))

    def correct(self, done: AttentionOutput, site: Site, memory: dict) -> tuple[Tensor, Tensor | None]:
        return self.inner.correct(done, site, memory.setdefault("inner", {}))


@dataclass(frozen=True, kw_only=True)
class Correction(Wrapper):
    """A method that changes what the executor computed, by any plan."""

    needs_lse = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if changes_output(self.inner):
            raise ValueError(f"{type(self).__name__} and {type(self.inner).__name__} would both correct the output")


def changes_output(method: Method) -> bool:
    """Whether a method changes what the executor computed."""
    if isinstance(method, PerHead):
        return any(changes_output(one) for _, one in method.methods)
    if type(method).correct is Wrapper.correct:
        return changes_output(method.inner)
    return type(method).correct is not Method.correct


def nested_methods(method: Method) -> Iterator[Method]:
    """A method and all that it is made of."""
    yield method
    parts: tuple[Method, ...] = ()
    if isinstance(method, Wrapper):
        parts = (method.inner,)
    elif isinstance(method, Union):
        parts = method.parts
    elif isinstance(method, PerHead):
        parts = tuple(one for _, one in method.methods)
    for part in parts:
        yield from nested_methods(part)


@dataclass(frozen=True, kw_only=True)
class Cached(Wrapper):
    """Keeps a plan over several steps: for a fixed number of them, and as long as the queries stay what they were.

    Source of the second rule: W. Wu et al., "TokenSelect", arXiv:2411.02886, who reuse a selection while the cosine of
    a query with the one that it was made for stays above a threshold. Here the queries are means of blocks.

    Attributes:
        every: plan anew after so many steps at the latest; None: never for that reason.
        drift: plan anew when 1 - cosine, averaged over blocks, exceeds it; None: never for that reason. Comparing
            waits for the device once a call.
    """

    static = False
    manages_own_plans = True
    every: int | None = None
    drift: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.every is not None and self.every < 1) or (self.drift is not None and not 0 <= self.drift <= 2):
            raise ValueError(f"every is at least 1 and drift from 0 to 2, not {self.every} and {self.drift}")

    def plan(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Plan | None:
        means = None if self.drift is None else pool(q, site.block)
        if "plan" not in memory or self._stale(means, site, memory):
            memory.update(plan=super().plan(q, k, site, memory), step=site.step, means=means)
        return memory["plan"]

    def _stale(self, means: Tensor | None, site: Site, memory: dict) -> bool:
        if self.every is not None and site.step - memory["step"] >= self.every:
            return True
        return means is not None and float(1 - F.cosine_similarity(means, memory["means"], -1).mean()) > self.drift


@dataclass(frozen=True, kw_only=True)
class PerHead(Method):
    """A method of its own for every head, all in one launch: what a profile says.

    Attributes:
        methods: letter and method, one pair for each. Those that make clusters cannot share a launch with others.
        layers: a string a layer, a letter a head.
    """

    methods: tuple[tuple[str, Method], ...]
    layers: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Method) for pair in self.methods):
            raise ValueError("methods are pairs of a letter and a dit_sparse.Method")
        known = [letter for letter, _ in self.methods]
        if cluster := next((type(one).__name__ for _, one in self.methods if one.clusters), None):
            raise ValueError(f"{cluster} makes clusters, which cannot share a launch with the blocks of other heads")
        if self.density is not None:
            raise ValueError("the methods of the heads have a density each; the mixture has none to give")
        if len(set(known)) < len(known) or any(len(letter) != 1 for letter in known):
            raise ValueError(f"every method has one letter of its own, not {known}")
        if unknown := set("".join(self.layers)) - set(known):
            raise ValueError(f"the layers name {sorted(unknown)}, but the methods are {known}")
        if not self.layers:
            raise ValueError("a mixture has at least one layer")

    @property
    def manages_own_plans(self) -> bool:
        return any(method.manages_own_plans for _, method in self.methods)

    @property
    def needs_lse(self) -> bool:
        return any(method.needs_lse for _, method in self.methods)

    def check_model(self, layers: int, heads: int) -> None:
        if layers != len(self.layers):
            raise ValueError(f"this is made for {len(self.layers)} layers of self-attention; the model has {layers}")
        if wrong := [len(line) for line in self.layers if len(line) != heads]:
            raise ValueError(f"this is made for {wrong[0]} heads a layer; the model has {heads}")
        for _, method in self.methods:
            method.check_model(layers, heads)

    def begin_generation(self, q: Tensor, site: Site, reserved_bytes: int = 0) -> int:
        before = reserved_bytes
        for _, method in self.methods:
            reserved_bytes += method.begin_generation(q, site, reserved_bytes)
        return reserved_bytes - before

    def plan(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Plan:
        line = self._line(q, site)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        plans, choice = [], torch.zeros(1, len(line), dtype=torch.long, device=q.device)
        for letter, method in self._used(line):
            heads = _places(line, letter, q.device)
            plan = self._part(method, q[:, heads], k[:, heads], site, memory.setdefault(letter, {}))
            choice[:, heads] = len(plans)
            plans.append(plan.expand_heads(heads, len(line)))
        return Plan.by_head(plans, choice)

    def correct(self, done: AttentionOutput, site: Site, memory: dict) -> tuple[Tensor, Tensor | None]:
        line, (out, lse) = self._line(done.q, site), (done.out, done.lse)
        for letter, method in self._used(line):
            if changes_output(method):
                mine = torch.tensor([one == letter for one in line], device=out.device)[:, None]
                better, its_lse = method.correct(done, site, memory[letter])
                out = torch.where(mine[..., None], better, out)
                lse = lse if lse is None or its_lse is None else torch.where(mine, its_lse, lse)
        return out, lse

    def _part(self, method: Method, q: Tensor, k: Tensor, site: Site, memory: dict) -> Plan:
        """The plan of the heads of one letter, new where it is due."""
        if "part" not in memory or method.manages_own_plans or site.needs_plan:
            plan = method.plan(q, k, site, memory)
            memory["part"] = Plan.dense(site.grid.tokens, site.block, q.device) if plan is None else plan
        return memory["part"]

    def _used(self, line: str) -> list[tuple[str, Method]]:
        return [(letter, method) for letter, method in self.methods if letter in line]

    def _line(self, q: Tensor, site: Site) -> str:
        self.check_model(site.layers, q.shape[1])
        return self.layers[site.layer]


def _places(line: str, letter: str, device: torch.device) -> Tensor:
    return torch.tensor([place for place, one in enumerate(line) if one == letter], device=device)
