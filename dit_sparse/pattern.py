"""Patterns: methods that depend on the grid alone, their settings at a density, and unions of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from .density import meet_density, pair_weights
from .grid import Grid, Site
from .method import Method
from .plan import Plan


@dataclass(frozen=True, kw_only=True)
class Pattern(Method):
    """A method that depends on geometry alone. Subclasses implement :meth:`keep` and set ``knob`` to the name of the
    setting that widens it.

    With ``density``, :meth:`resolve` solves for the knob or, if the pattern is too dense at the smallest value of the
    knob, for the settings of ``narrowing`` one after the other. The rest of the density is filled with single blocks,
    see :func:`dit_sparse.density.meet_density`.

    Attributes:
        knob: name of the field that widens the pattern.
        knob_range: smallest and largest value of the knob, from almost no blocks to all.
        narrowing: names of further fields, and their narrowest values.
    """

    static: ClassVar[bool] = True
    knob: ClassVar[str]
    knob_range: ClassVar[tuple[float, float]]
    narrowing: ClassVar[tuple[tuple[str, float], ...]] = ()

    def keep(self, grid: Grid, block: int) -> Tensor:
        """Return which key blocks each query block attends to, bool ``[Qb, Qb]``."""
        raise NotImplementedError

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Plan:
        return _cached_plan(self, site.grid, site.block).to(q.device)

    def block_mask(self, grid: Grid, block: int) -> Tensor:
        """Return the pattern with the required blocks, at the density if one is given, bool ``[Qb, Qb]``."""
        if self.density is None:
            return self.keep(grid, block) | self.required(grid, block)
        return _solve(self, grid, block)[1]

    def resolve(self, grid: Grid, block: int) -> Pattern:
        """Return the pattern with the settings found for its density; the single blocks are not included."""
        return self if self.density is None else _solve(self, grid, block)[0]

    def stages(self) -> list[Callable[[float], Pattern]]:
        """Return functions from the knob in [0, 1] to a pattern, each narrower than the one before it."""
        least, greatest = self.knob_range
        stages, pattern = [_setter(self, self.knob, least, greatest)], self
        for name, least in self.narrowing:
            pattern = stages[-1](0.0)
            stages.append(_setter(pattern, name, least, getattr(pattern, name)))
        return stages


def _setter(pattern: Pattern, name: str, least: float, greatest: float) -> Callable[[float], Pattern]:
    """Return the function that sets a field between two values, in geometric steps if both are positive."""

    def at(knob: float) -> Pattern:
        value = least * (greatest / least) ** knob if least > 0 else least + (greatest - least) * knob
        value = round(value) if isinstance(getattr(pattern, name), int) else float(f"{value:.4g}")
        return replace(pattern, density=None, **{name: value})

    return at


@dataclass(frozen=True, kw_only=True)
class Union(Pattern):
    """Union of patterns, ``Radial() | Sink()``: keeps every block that any of them keeps.

    A density widens the first pattern; the others keep their settings.

    Attributes:
        parts: the patterns; all must use the same token order.
    """

    parts: tuple[Pattern, ...] = field(default=())

    def __post_init__(self) -> None:
        if not isinstance(self.parts, tuple) or not self.parts or not all(isinstance(p, Pattern) for p in self.parts):
            raise ValueError("only patterns, which depend on geometry alone, can be united with |")
        super().__post_init__()
        self.order(Grid(2, 2, 2), 16)

    def order(self, grid: Grid, block: int) -> Tensor | None:
        first, *others = (part.order(grid, block) for part in self.parts)
        same = lambda other: other is first or (first is not None and other is not None and first.equal(other))
        if not all(map(same, others)):
            raise ValueError("patterns with different token orders cannot be united")
        return first

    def keep(self, grid: Grid, block: int) -> Tensor:
        return self.parts[0].block_mask(grid, block) | self._others(grid, block)

    def required(self, grid: Grid, block: int) -> Tensor:
        return super().required(grid, block) | self._others(grid, block)

    def resolve(self, grid: Grid, block: int) -> Union:
        solved = super().resolve(grid, block)
        return replace(solved, parts=tuple(part.resolve(grid, block) for part in solved.parts))

    def stages(self) -> list[Callable[[float], Pattern]]:
        with_first = lambda first: replace(self, density=None, parts=(first, *self.parts[1:]))
        return [lambda knob, stage=stage: with_first(stage(knob)) for stage in self.parts[0].stages()]

    def _others(self, grid: Grid, block: int) -> Tensor:
        """Return the blocks of all patterns but the first."""
        masks = [_cached_mask(part, grid, block) for part in self.parts[1:]]
        return torch.stack(masks).any(0) if masks else torch.zeros((), dtype=torch.bool)


@lru_cache(maxsize=16)
def _solve(pattern: Pattern, grid: Grid, block: int) -> tuple[Pattern, Tensor]:
    """Return a pattern with the settings for its density, and its mask at the density."""
    required, stages = pattern.required(grid, block), pattern.stages()
    masks = [lambda knob, stage=stage: stage(knob).keep(grid, block) | required for stage in stages]
    stage, knob, mask = meet_density(masks, required, pair_weights(grid, block), pattern.density)
    return stages[stage](knob), mask


@lru_cache(maxsize=4)
def _cached_mask(pattern: Pattern, grid: Grid, block: int) -> Tensor:
    """Mask of a fixed part of a union, which every step of the bisection needs."""
    return pattern.block_mask(grid, block)


@lru_cache(maxsize=16)
def _cached_plan(pattern: Pattern, grid: Grid, block: int) -> Plan:
    """Plan of a pattern, shared by all layers even if the pattern is part of a method that is not static."""
    keep = pattern.block_mask(grid, block)
    return Plan.from_mask(keep[None, None], grid.tokens, block, pattern.order(grid, block))
