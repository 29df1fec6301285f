"""Planning time of methods, as a share of one dense attention call of the same process.

All functions take turns. A share is the median of the ratios within each round, of CPU time on a CPU, so that a busy
machine has little effect. Two steps are measured: the first sparse one, and one two steps later, when methods with
a state reuse what they know. Methods whose layers share a state are measured over several layers, others on one.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse import Grid, Method, Site
from dit_sparse.method import shared_memory
from dit_sparse.methods import kind_of, method_at_density

from .synthetic_qkv import synthetic_qkv
from .timing import cpu_time_of_call, first_line, interleaved_durations

LAYERS = 6  # of a method whose layers share a state
FIRST_STEP, LATER_STEP, STEPS = 4, 6, 16


@dataclass(frozen=True)
class Problem:
    """A self-attention call of synthetic queries, keys and values, see `synthetic_qkv`."""

    grid: Grid = Grid(16, 32, 32)  # noqa: RUF009
    heads: int = 2
    dim: int = 64
    density: float = 0.25
    block: int = 64

    def settings(self) -> dict:
        shape = {"grid": str(self.grid), "tokens": self.grid.tokens, "heads": self.heads, "dim": self.dim}
        return shape | {"density": self.density, "block": self.block}


class Planner:
    """The plans of a method at two steps.

    Attributes:
        layers: number of layers that a step plans for.
    """

    def __init__(self, method: Method, qkv: Sequence[Tensor], site: Site) -> None:
        q, k, v = qkv
        self._plan = partial(method.plan, q, k, v if method.needs_values else None)
        self._site, self.layers = site, 1
        self._state = self._memories()
        self._step(FIRST_STEP, self._state)
        if shared_memory(self._state[0]):
            self.layers = LAYERS
            self._state = self._memories()
            self._step(FIRST_STEP, self._state)

    def first(self) -> None:
        """Make the plans of the first sparse step."""
        self._step(FIRST_STEP, self._memories())

    def later(self) -> None:
        """Make the plans of a later step, from the state after the first one."""
        shared = _copy_dicts(shared_memory(self._state[0]))
        self._step(LATER_STEP, [_copy_dicts(memory) | {"shared": shared} for memory in self._state])

    def _memories(self) -> list[dict]:
        shared: dict = {}
        return [{"shared": shared} for _ in range(self.layers)]

    def _step(self, step: int, memories: list[dict]) -> None:
        for layer, memory in enumerate(memories):
            self._plan(replace(self._site, layer=layer, layers=self.layers, step=step, steps=STEPS), memory)


@torch.no_grad()
def measure(names: Sequence[str], problem: Problem, seconds: float, device: str = "cpu") -> Iterator[dict]:
    """Yield a row for every method.

    Args:
        names: methods as text.
        problem: the call.
        seconds: about how long to measure in all; every function is called at least four times.
        device: "cpu" or "cuda".

    Yields:
        ``method``, ``kind``, ``layers``, ``static``, and ``first`` and ``later``, the planning time of a layer as a
        share of dense attention; or ``method``, ``kind`` and ``why_not`` for a method that fails. Static plans are
        cached and measured from the cache.
    """
    qkv, site = synthetic_qkv(problem.grid, problem.heads, problem.dim, device), Site(problem.grid, problem.block)
    planners, functions = {}, {"dense": partial(F.scaled_dot_product_attention, *qkv)}
    methods = {name: method_at_density(name, problem.density) for name in names}
    for name, method in methods.items():
        row = {"method": name, "kind": kind_of(name)}
        try:
            planners[name] = Planner(method, qkv, site)
        except (RuntimeError, ValueError) as error:
            yield row | {"why_not": first_line(error)}
            continue
        functions |= {(name, "first"): planners[name].first, (name, "later"): planners[name].later}
    durations = interleaved_durations(functions, seconds, device, cpu_time_of_call)
    dense = durations.pop("dense")
    for name, planner in planners.items():
        shares = {
            step: statistics.median(
                one / planner.layers / whole for one, whole in zip(durations[name, step], dense, strict=True)
            )
            for step in ("first", "later")
        }
        rounds = {"rounds": len(dense), "dense_seconds": statistics.median(dense)}
        static = methods[name].static
        yield {"method": name, "kind": kind_of(name), "layers": planner.layers, "static": static} | shares | rounds


def _copy_dicts(value: dict) -> dict:
    """Return a copy of nested dicts; what they hold is not copied."""
    return {key: _copy_dicts(part) if isinstance(part, dict) else part for key, part in value.items()}
