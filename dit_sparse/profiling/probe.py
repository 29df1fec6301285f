"""Measurement of candidates on the attention calls of a pipeline that runs densely.

The error of a candidate is that of a head's output, ``|O_m - O| / |O|``, because attention mass explains only part of
it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..clusters import ClusterPlan
from ..engine.enable import enable
from ..engine.plans import Plans
from ..grid import Site
from ..kernels.calibration import CallSignature, cost_model
from ..kernels.pick import pick
from ..method import AttentionOutput, Method, shared_memory
from ..plan import Plan
from ..schedule import Schedule
from .candidates import Candidate

STEPS_MEASURED = 3


@dataclass
class Measurements:
    """Means over the measured calls, ``[candidates, layers, heads]``.

    Attributes:
        error: squared relative errors.
        density: densities.
        seconds: seconds per call, estimated by the cost model of the executor.
        grids: token grids of the calls.
        steps: steps of the calls.
    """

    error: Tensor
    density: Tensor
    seconds: Tensor
    grids: set[str]
    steps: set[int]

    @classmethod
    def mean(cls, measurements: Sequence[Measurements]) -> Measurements:
        """Return the means over several measurements of the same candidates, such as of several lengths."""
        tables = ([getattr(one, name) for one in measurements] for name in ("error", "density", "seconds"))
        grids, steps = ([getattr(one, name) for one in measurements] for name in ("grids", "steps"))
        return cls(*(torch.stack(table).mean(0) for table in tables), set().union(*grids), set().union(*steps))


def measure_candidates(
    pipe: Any,
    generate: Callable[[], None],
    candidates: Sequence[Candidate],
    schedule: Schedule,
    block: int | None = None,
) -> Measurements:
    """Measure every candidate on every head at a few steps of a generation, which stays dense.

    Args:
        pipe: a pipeline, as for ``enable``.
        generate: generates one clip or several with ``pipe``.
        candidates: the candidates.
        schedule: of the steps that it leaves sparse, the first, a middle and the last are measured.
        block: tokens in a block.

    Raises:
        ValueError: the schedule keeps all steps dense, or no call can be sparse.
    """
    probe = Probe(methods=tuple(candidate.method for candidate in candidates), schedule=schedule)
    with enable(pipe, probe, dense_steps=0, min_tokens=0, block=block):
        generate()
    return probe.recorder.measurements()


def measured_steps(schedule: Schedule, steps: int | None, count: int) -> list[int]:
    """Return ``count`` evenly spread steps, from the first sparse one to the last; if the number of steps is unknown,
    the first sparse one alone.

    Raises:
        ValueError: the schedule keeps all steps dense.
    """
    first = schedule.first_sparse_step(steps)
    if steps is not None and first >= steps:
        raise ValueError(
            f"dense_steps={schedule.dense_steps} keeps all {steps} steps dense: no step is left to measure candidates"
        )
    return torch.linspace(first, first if steps is None else steps - 1, count).round().int().tolist()


def candidate_plans(methods: Sequence[Method], memory: dict, schedule: Schedule) -> list[Plans]:
    """Return the plan cache of each method, stored in the memory that all layers of the probing method share.

    Plans stay on the CPU between calls, because those of all methods and layers exceed the memory of a GPU.
    """
    every_step = replace(schedule, replan_interval=1)
    shared = shared_memory(memory)
    return [shared.setdefault(i, Plans(m, every_step, offload=True)) for i, m in enumerate(methods)]


def squared_error(
    method: Method, dense: AttentionOutput, plan: Plan | ClusterPlan, attend: Callable, site: Site, memory: dict
) -> Tensor:
    """Return the squared relative error ``|O_m - O|^2 / |O|^2`` of every head, float64 ``[H]``, without padding.

    Args:
        method: corrects the output.
        dense: the call and its dense output.
        plan: plan of the method for this call.
        attend: function of an executor.
        site, memory: as for ``Method.correct``.
    """
    out, lse = attend(dense.q, dense.k, dense.v, plan, scale=dense.scale)
    attend_densely = lambda: (dense.out, dense.lse)
    sparse = AttentionOutput(dense.q, dense.k, dense.v, plan, dense.scale, out, lse, attend_densely)
    out, exact = method.correct(sparse, site, memory)[0].double(), dense.out.double()
    if plan.lengths is not None:
        padding = torch.arange(plan.tokens, device=out.device) >= plan.lengths.to(out.device)[:, None]
        out, exact = (x.masked_fill(padding[:, None, :, None], 0) for x in (out, exact))
    energy = lambda x: x.square().sum((0, 2, 3))
    return energy(out - exact) / energy(exact).clamp(min=1e-30)


class Recorder:
    """Sums of measurements by layer."""

    def __init__(self) -> None:
        self._by_layer: dict[int, list[Tensor]] = {}
        self._grids: set[str] = set()
        self._steps: set[int] = set()

    def add(self, site: Site, values: Tensor) -> None:
        """Add error, density and seconds of a call, ``[3, candidates, H]``."""
        self._grids.add(str(site.grid))
        self._steps.add(site.step)
        self._by_layer.setdefault(site.layer, []).append(values)

    def measurements(self) -> Measurements:
        """Return the means over calls. Raises ValueError if there was none."""
        if not self._by_layer:
            raise ValueError("no attention call of this pipeline can be sparse, so there is nothing to measure")
        layers = [torch.stack(self._by_layer[layer]).mean(0) for layer in sorted(self._by_layer)]
        return Measurements(*torch.stack(layers, 2).unbind(0), self._grids, self._steps)


@dataclass(frozen=True, kw_only=True)
class Probe(Method):
    """Dense attention that also measures other methods on its calls.

    Attributes:
        methods: the methods to measure.
        schedule: determines the steps to measure them at.
        recorder: collects the measurements.
    """

    methods: tuple[Method, ...]
    schedule: Schedule
    recorder: Recorder = field(default_factory=Recorder, compare=False)

    def check_model(self, layers: int, heads: int) -> None:
        for method in self.methods:
            method.check_model(layers, heads)

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Plan:
        return Plan.dense(site.grid.tokens, site.block, q.device)

    def correct(self, result: AttentionOutput, site: Site, memory: dict) -> tuple[Tensor, Tensor | None]:
        if site.step in measured_steps(self.schedule, site.steps, STEPS_MEASURED):
            site = replace(site, needs_plan=True)
            rows = [_measure(plans, result, site) for plans in candidate_plans(self.methods, memory, self.schedule)]
            self.recorder.add(site, torch.stack(rows, 1))
        return result.out, result.lse


def _measure(plans: Plans, dense: AttentionOutput, site: Site) -> Tensor:
    """Return squared relative error, density and estimated seconds of every head, ``[3, H]``."""
    heads, tokens = dense.q.shape[1:3]
    plan = plans.plan(dense.q, dense.k, site, dense.plan.lengths, dense.v)
    if plan is None:
        seconds = cost_model("dense", CallSignature.from_call(dense.q, dense.plan)).seconds(tokens, tokens**2)
        return torch.stack([torch.zeros(heads), torch.ones(heads), torch.full((heads,), seconds)])
    plan = plan.with_lengths(dense.plan.lengths)
    choice = pick("auto", dense.q, dense.k, plan, lse=plans.method.needs_lse)
    memory = plans.memory(dense.q, site)
    error = squared_error(plans.method, dense, plan, choice.executor.attend, site, memory).float().cpu()
    density = plan.density_by_head.mean(0).float().cpu().expand(heads)
    cost = cost_model(choice.name, CallSignature.from_call(dense.q, plan))
    seconds = replace(cost, fixed=cost.fixed / heads).seconds(tokens, tokens**2 * density)
    return torch.stack([error, density, seconds])
