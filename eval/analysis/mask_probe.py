"""A probe that measures the masks of other methods while a pipeline runs densely.

At each sampled step every method makes a new plan for the call. Branches of guidance share plans as in a sparse run,
except for methods that manage their own plans, so the staleness of plans between steps is not measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse import Method, Plan, Schedule, Site
from dit_sparse.engine.plans import Plans
from dit_sparse.kernels.pick import pick
from dit_sparse.method import AttentionOutput
from dit_sparse.profiling.probe import candidate_plans, measured_steps, squared_error

from .upper_bounds import group_mass, retained_and_bounds

METRICS = ("density", "retained", "best", "best_by_row", "best_row_major", "error")


@torch.no_grad()
def measure_mask(plans: Plans, dense: AttentionOutput, site: Site, row_major_mass: Tensor) -> dict[str, Tensor]:
    """Return each of `METRICS` for a method on one call, float64 ``[H]``: means over the batch.

    Args:
        plans: the method and its plans.
        dense: the call computed with a full plan of row-major blocks, with its log-sum-exp.
        site: where the call is.
        row_major_mass: `group_mass` of that plan.

    Returns:
        The metrics by name; ``error`` is the squared relative error of the output. A method without a plan, such as
        ``dense``, has error 0 and 1 for all others.
    """
    method, plan = plans.method, plans.plan(dense.q, dense.k, site, dense.plan.lengths, dense.v)
    heads = dense.q.shape[1]
    if plan is None:
        return {name: torch.full((heads,), float(name != "error"), dtype=torch.float64) for name in METRICS}
    plan = plan.with_lengths(dense.plan.lengths)
    by_head = {"density": plan.density_by_head} | retained_and_bounds(dense, plan, site, row_major_mass)
    metrics = {name: value.mean(0).expand(heads) for name, value in by_head.items()}
    choice = pick("auto", dense.q, dense.k, plan, lse=method.needs_lse)
    memory = plans.memory(dense.q, site)
    metrics["error"] = squared_error(method, dense, plan, choice.executor.attend, site, memory)
    return {name: value.cpu() for name, value in metrics.items()}


@dataclass
class MetricSums:
    """Running sums of the metrics, and the calls that they come from.

    Attributes:
        sums: ``[methods, metrics, H]`` by layer.
        calls: number of measured calls by layer.
        grids, steps, blocks: token grids, denoising steps and block sizes of the measured calls.
    """

    sums: dict[int, Tensor] = field(default_factory=dict)
    calls: dict[int, int] = field(default_factory=dict)
    grids: set[str] = field(default_factory=set)
    steps: set[int] = field(default_factory=set)
    blocks: set[int] = field(default_factory=set)

    def add(self, site: Site, metrics: Tensor) -> None:
        """Add the metrics of one call, ``[methods, metrics, H]``."""
        self.sums[site.layer] = self.sums.get(site.layer, 0) + metrics
        self.calls[site.layer] = self.calls.get(site.layer, 0) + 1
        self.grids.add(str(site.grid))
        self.steps.add(site.step)
        self.blocks.add(site.block)

    def means(self) -> Tensor:
        """Return the means over the calls, ``[methods, metrics, L, H]``."""
        return torch.stack([self.sums[layer] / self.calls[layer] for layer in sorted(self.sums)], 2)


@dataclass(frozen=True, kw_only=True)
class MaskProbe(Method):
    """Dense attention that measures the masks of other methods at sampled steps.

    Attributes:
        methods: the methods to measure.
        results: receives the metrics of every measured call.
        schedule: steps that it keeps dense are not measured.
        sampled_steps: number of the other steps to measure.
    """

    needs_lse: ClassVar[bool] = True
    methods: tuple[Method, ...]
    results: MetricSums = field(compare=False)
    schedule: Schedule
    sampled_steps: int

    def check_model(self, layers: int, heads: int) -> None:
        for method in self.methods:
            method.check_model(layers, heads)

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Plan:
        return Plan.dense(site.grid.tokens, site.block, q.device)

    def correct(self, dense: AttentionOutput, site: Site, memory: dict) -> tuple[Tensor, Tensor | None]:
        if site.step in measured_steps(self.schedule, site.steps, self.sampled_steps):
            row_major_mass = group_mass(dense.q, dense.k, dense.lse, dense.plan, dense.scale)
            plans, fresh = candidate_plans(self.methods, memory, self.schedule), replace(site, needs_plan=True)
            rows = [measure_mask(one, dense, fresh, row_major_mass) for one in plans]
            self.results.add(site, torch.stack([torch.stack([row[name] for name in METRICS]) for row in rows]))
        return dense.out, dense.lse
