"""What a run computed: counters, and the report made of them."""

from __future__ import annotations

import logging
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch

from ..clusters import ClusterPlan
from ..grid import Grid, Site
from ..methods import name_of
from ..plan import Plan
from .settings import Settings

log = logging.getLogger("dit_sparse")


@dataclass(frozen=True)
class Report:
    """What a run has computed since it began. ``print(report)`` shows it as text.

    Attributes:
        preset: name of the preset, with the paper of its schedule; None if the method was given in another way.
        method, settings: name and settings of the method.
        schedule: fields of the `Schedule`.
        resolved: by token grid, the method with the settings found for its density, for methods that solve for
            settings.
        executors: number of sparse calls by executor.
        choices: choices of the executor ``"auto"`` with their reasons, and the number of layers and call signatures for
            which each was made. Methods whose density varies choose again for every clip.
        grids: token grids of the sparse calls.
        sparse_calls: number of self-attention calls computed sparsely.
        dense_calls: number of self-attention calls computed densely, by reason.
        density_asked: requested density, or None if the method's own settings decide.
        density_achieved: fraction of the query-key pairs computed in sparse calls, or None before the first one. Pairs
            with reference tokens, which are all computed, are not counted.
        density_by_step: requested density of the sparse steps, if it changes over the steps.
        tail_density: pairs of a query and a pooled term in sparse calls, as a fraction of the query-key pairs; None
            before the first sparse call. Such pairs are not part of ``density_achieved`` and cost as much as others.
        density_note: why the achieved density differs from the requested one by more than 0.01; None if it does not.
        density_run: the same for all self-attention calls, including dense steps and layers.
        guard: by layer, if the run has a quality guard: the least attention mass that a plan retained, and how often
            the density was raised; three times means dense.
        attention_seconds: time in self-attention calls, including planning.
        planning_seconds: time spent on plans.
    """

    preset: str | None
    method: str
    settings: dict
    schedule: dict
    resolved: dict[str, str]
    executors: dict[str, int]
    choices: dict[str, int]
    grids: list[str]
    sparse_calls: int
    dense_calls: dict[str, int]
    density_asked: float | None
    density_achieved: float | None
    density_by_step: dict[int, float]
    tail_density: float | None
    density_note: str | None
    density_run: float | None
    guard: dict[str, dict[str, float]]
    attention_seconds: float
    planning_seconds: float

    def as_dict(self) -> dict:
        """Return the report as plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        decimals = lambda value: "-" if value is None else f"{value:.3f}"
        executors = ", ".join(f"{count} by {name}" for name, count in self.executors.items())
        choices = sorted(self.choices, key=self.choices.get, reverse=True)[:3]
        return "\n".join(
            [
                f"{self.method}: density requested {decimals(self.density_asked)}, "
                f"achieved {decimals(self.density_achieved)}, whole run {decimals(self.density_run)}",
                *([f"  preset           {self.preset}"] if self.preset else []),
                *([f"  pooled tail      {self._tail_text()}"] if self.tail_density else []),
                f"  grid             {', '.join(self.grids) or '-'}",
                f"  sparse calls     {self.sparse_calls}" + (f": {executors}" if executors else ""),
                *(f"  dense calls      {count}: {reason}" for reason, count in self.dense_calls.items()),
                *(f"  settings         {method} on {grid}" for grid, method in self.resolved.items()),
                *([f"  density by step  {_by_step(self.density_by_step)}"] if self.density_by_step else []),
                *([f"  density          {self.density_note}"] if self.density_note else []),
                *([f"  quality guard    {self._guard_text()}"] if self.guard else []),
                *(f"  executor choice  {choice}" for choice in choices),
                f"  attention time   {self.attention_seconds:.1f} s",
                f"  planning time    {self.planning_seconds:.1f} s, included in the attention time",
            ]
        )

    def _guard_text(self) -> str:
        layer, weakest = min(self.guard.items(), key=lambda item: item[1]["least_mass"])
        raised = sum(one["raised"] > 0 for one in self.guard.values())
        return (
            f"plans retain at least {weakest['least_mass']:.3f} of the attention mass ({layer}); "
            f"{raised} of {len(self.guard)} layers compute more pairs"
        )

    def _tail_text(self) -> str:
        cost = self.density_achieved + self.tail_density
        return f"{self.tail_density:.3f} of the pairs in addition: sparse calls cost {cost:.3f} of dense ones"


@dataclass
class RunCounters:
    """The counters of a run."""

    executors: Counter = field(default_factory=Counter)
    choices: Counter = field(default_factory=Counter)
    dense: Counter = field(default_factory=Counter)
    grids: dict[tuple[Grid, int], None] = field(default_factory=dict)  # and blocks
    sparse_calls: int = 0
    sparse_pairs: int = 0
    computed_in_sparse: float | torch.Tensor = 0.0  # pairs; a tensor, because reading it would synchronize with the GPU
    observed_pairs: float | torch.Tensor = 0.0  # computed in dense steps for methods that observe them
    density_by_step: dict[int, float] = field(default_factory=dict)
    pooled_in_sparse: float | torch.Tensor = 0.0  # pairs of a query and a pooled term
    reference_pairs: float = 0.0  # pairs with reference tokens in sparse calls, not part of the two numbers above
    guarded_layers: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)
    dense_pairs: int = 0
    unsized_calls: int = 0
    logged: set[str] = field(default_factory=set)
    attention: Stopwatch = field(default_factory=lambda: Stopwatch())
    planning: Stopwatch = field(default_factory=lambda: Stopwatch())

    def count_sparse(self, site: Site, pairs: int, plan: Plan | ClusterPlan, executor: str) -> None:
        """Count a sparse call of ``pairs`` query-key pairs."""
        self.sparse_calls += 1
        self.executors[executor] += 1
        self.grids[site.grid, site.block] = None
        references = pairs * site.reference_share
        self.sparse_pairs += pairs - references
        self.reference_pairs += references
        # not in place, because the tensor may have been created in inference mode
        self.computed_in_sparse = self.computed_in_sparse + (pairs * plan.mean_density - references)
        self.pooled_in_sparse = self.pooled_in_sparse + pairs * plan.mean_tail_density

    def count_density(self, site: Site, density: float | None) -> None:
        """Record the requested density of a sparse step."""
        if density is not None:
            self.density_by_step[site.step] = density

    def count_observation(self, pairs: torch.Tensor) -> None:
        """Count query-key pairs that are computed in addition to those of a dense call."""
        self.observed_pairs = self.observed_pairs + pairs

    def count_dense(self, reason: str, pairs: int | None) -> None:
        """Count a dense call. Without ``pairs`` it counts as a call of average size."""
        self.dense[reason] += 1
        self.unsized_calls += pairs is None
        self.dense_pairs += pairs or 0

    def count_guard(self, component: str, layer: int, mass: float, raised: int) -> None:
        """Record the attention mass that the plans of a layer retained, and how often its density was raised."""
        before = self.guarded_layers.get((component, layer), {"least_mass": 1.0, "raised": 0})
        least = {"least_mass": min(mass, before["least_mass"]), "raised": max(raised, before["raised"])}
        self.guarded_layers[component, layer] = least

    def warn(self, reason: str) -> str:
        """Log a reason for a dense call, once per run, and return it."""
        if reason not in self.logged:
            self.logged.add(reason)
            log.warning("attention stays dense: %s", reason)
        return reason

    @property
    def density_achieved(self) -> float | None:
        return float(self.computed_in_sparse) / self.sparse_pairs if self.sparse_pairs else None

    @property
    def tail_density(self) -> float | None:
        return float(self.pooled_in_sparse) / self.sparse_pairs if self.sparse_pairs else None

    @property
    def density_run(self) -> float | None:
        sized_calls = self.sparse_calls + self.dense.total() - self.unsized_calls
        dense_pairs = self.dense_pairs + self.reference_pairs
        dense_pairs += self.unsized_calls * (self.sparse_pairs + dense_pairs) / max(sized_calls, 1)
        pairs = self.sparse_pairs + dense_pairs
        computed = float(self.computed_in_sparse) + float(self.observed_pairs) + dense_pairs
        return computed / pairs if pairs else None

    def report(self, run: Settings) -> Report:
        """Return the report of a run with these settings."""
        method, achieved = run.method, self.density_achieved
        resolved = {str(grid): method.resolve(grid, block) for grid, block in self.grids}
        notes = [] if achieved is None else [method.density_note(*one, achieved) for one in self.grids]
        if any(layer["raised"] for layer in self.guarded_layers.values()):
            notes = ["the quality guard raised it"]
        return Report(
            preset=run.preset,
            method=name_of(method),
            settings=method.settings(),
            schedule=asdict(run.schedule),
            resolved={grid: name_of(one) for grid, one in resolved.items() if one != method},
            executors=dict(self.executors),
            choices=dict(self.choices),
            grids=[str(grid) for grid, _ in self.grids],
            sparse_calls=self.sparse_calls,
            dense_calls=dict(self.dense),
            density_asked=method.density,
            density_achieved=achieved,
            density_by_step=self.density_by_step if len(set(self.density_by_step.values())) > 1 else {},
            tail_density=self.tail_density,
            density_note="; ".join(dict.fromkeys(filter(None, notes))) or None,
            density_run=self.density_run,
            guard={f"{name} layer {layer}": mass for (name, layer), mass in sorted(self.guarded_layers.items())},
            attention_seconds=self.attention.seconds,
            planning_seconds=self.planning.seconds,
        )


def _by_step(densities: dict[int, float]) -> str:
    """Return the densities with the first step of each: ``0.31 from step 2, 0.19 from step 4``."""
    steps = sorted(densities)
    changes = [
        step for before, step in zip([None, *steps], steps, strict=False) if densities.get(before) != densities[step]
    ]
    return ", ".join(f"{densities[step]:.3g} from step {step}" for step in changes)


class Stopwatch:
    """Sum of durations: CUDA events on a GPU, read only when the sum is needed, and the system clock elsewhere."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def timing(self, device: torch.device):
        """Add the duration of a ``with`` block."""
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin

    @property
    def seconds(self) -> float:
        """The sum so far. On a GPU reading it waits for the last event."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
            self._events.clear()
        return self._seconds
