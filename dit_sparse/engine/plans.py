"""The plans of a run, cached between steps and shared by the branches of guidance.

Guidance of scale g adds g times the conditional prediction and 1 - g times the unconditional one. If both branches have
the same error, so has the sum. If their errors are independent and of equal size, the error of the sum is larger by the
factor sqrt(g^2 + (1 - g)^2): five times at g = 4. Branches that compute the same blocks have nearly the same error.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from ..clusters import ClusterPlan
from ..composition import map_density
from ..grid import Site
from ..method import Method
from ..plan import Plan
from ..schedule import Schedule
from ..scoring import without_padding
from .guard import QualityGuard
from .report import Stopwatch

CORRECTIONS = 4  # plans made at most to correct the density of the last queries of a sequence
TOLERANCE = 0.005


@dataclass(frozen=True)
class CachedPlan:
    """A plan, the step and branch of the call it was made for, the method with the density of that step, and the last
    step at which the schedule renewed it. Methods that manage their own plans are called at every step."""

    plan: Plan | ClusterPlan | None
    step: int
    branch: str
    method: Method
    renewed: int

    def is_shared_by(self, site: Site) -> bool:
        """Whether the plan was made in the same step for the other branch. A second call of the same branch in a step
        belongs to another part of the video, as in pipelines that denoise long videos in windows."""
        return self.step == site.step and self.branch != site.branch


class Plans:
    """Plans and the memory of a method, by layer, grid and pair of branches; static plans by grid.

    Args:
        method: makes the plans.
        schedule: how often plans are made, and whether each branch of guidance has its own.
        stopwatch: measures the planning time.
        offload: whether to keep plans on the CPU between calls.
        guard: raises the density of layers.
    """

    def __init__(
        self, method: Method, schedule: Schedule | None = None, stopwatch: Stopwatch | None = None,
        offload: bool = False, guard: QualityGuard | None = None,
    ) -> None:  # fmt: skip
        self.method, self._schedule, self._offload = method, schedule or Schedule(), offload
        self._stopwatch, self._guard = stopwatch or Stopwatch(), guard
        self._cache: dict[tuple, CachedPlan] = {}
        self._previews: dict[tuple, CachedPlan] = {}
        self._methods: dict[tuple, Method] = {}  # key: everything that the density depends on
        self._memory: dict[tuple, dict] = {}
        self._shared_memory: dict[tuple, dict] = defaultdict(dict)  # of all layers

    def plan(
        self, q: Tensor, k: Tensor, site: Site, lengths: Tensor | None = None, v: Tensor | None = None
    ) -> Plan | ClusterPlan | None:
        """Return the plan for ``q, k [B, H, N, D]``, a new one if there is none or the schedule asks for it. It does
        not depend on tokens after the ``lengths [B]``."""
        method = self._method_at(site)
        static_key = site.grid, site.first_query, q.device, method
        key = static_key if method.static else (*self._key(q, site), len(q), q.device)
        cached = self._cache.get(key)
        self._previews.pop(key, None)
        # Compared with the last renewal: caches may skip a step, and some schedulers evaluate a step twice.
        is_due = cached is None or site.step - cached.renewed >= self._schedule.replan_interval
        if cached is not None and cached.method is not method:
            is_due = True
            if method.manages_own_plans:
                self._memory.pop(self._key(q, site), None)  # it holds the plan of the previous density
        site = replace(site, needs_plan=is_due or site.step == cached.renewed)
        may_be_stale = not method.static and (method.manages_own_plans or site.needs_plan)
        if cached is None or (may_be_stale and not cached.is_shared_by(site)):
            with self._stopwatch.timing(q.device):
                plan = self._make_plan(method, q, k, v, site, lengths)
            stored = plan.to("cpu") if self._offload and plan is not None else plan
            renewed = site.step if site.needs_plan else cached.renewed
            self._cache[key] = CachedPlan(stored, site.step, site.branch, method, renewed)
            return plan
        return cached.plan.to(q.device) if self._offload and cached.plan is not None else cached.plan

    def preview(
        self, q: Tensor, k: Tensor, site: Site, lengths: Tensor | None = None, v: Tensor | None = None
    ) -> Plan | ClusterPlan | None:
        """Return the plan of the first sparse step, made from a call of the last dense step and shared by both
        branches."""
        key, method = (*self._key(q, site), len(q), q.device), self._method_at(site)
        cached = self._previews.get(key)
        if cached is None or not cached.is_shared_by(site):
            with self._stopwatch.timing(q.device):
                plan = self._make_plan(method, q, k, v, replace(site, needs_plan=True), lengths)
            cached = self._previews[key] = CachedPlan(plan, site.step, site.branch, method, site.step)
        return cached.plan

    def density_at(self, site: Site) -> float | None:
        """Return the requested density of the plans of a step; None: the method's own settings decide."""
        return self._method_at(replace(site, references=0)).density

    def memory(self, q: Tensor, site: Site) -> dict:
        """Return the memory of a method for a layer, grid and pair of branches; "shared" holds that of all layers."""
        key = self._key(q, site)
        if key not in self._memory:
            self._memory[key] = {"shared": self._shared_memory[self._key(q, replace(site, layer=-1))]}
        return self._memory[key]

    def end_generation(self) -> None:
        """Drop memory and plans, except static plans, which depend on the grid alone."""
        self._memory.clear()
        self._shared_memory.clear()
        self._previews.clear()
        if not self.method.static:
            self._cache.clear()

    def _method_at(self, site: Site) -> Method:
        """Return the method with the density of a step over all pairs, those with reference tokens included. Equal
        densities return the same object."""
        level = self._guard.level(site) if self._guard else 0
        key = site.step, site.steps, site.references, site.first_query, site.grid, level
        if key not in self._methods:
            method = map_density(self.method, partial(self._density, site))
            self._methods[key] = next((one for one in (self.method, *self._methods.values()) if one == method), method)
        return self._methods[key]

    def _density(self, site: Site, density: float) -> float:
        density = self._schedule.density_at(site, density, ramp=self.method.density_ramp)
        if self._guard:
            density = self._guard.density(site, density)
        return 1 - (1 - density) * (1 - site.reference_share) if site.references else density

    def _make_plan(
        self, method: Method, q: Tensor, k: Tensor, v: Tensor | None, site: Site, lengths: Tensor | None
    ) -> Plan | ClusterPlan | None:
        """Make a plan for the queries of the site. A method distributes its density over all queries, so the density of
        the last ones is corrected."""
        plan = self._make_full_plan(method, q, k, v, site, lengths)
        if plan is None or not site.first_query:
            return plan
        plan = plan.for_queries(site.first_query)
        if method.density is None or method.manages_own_plans:
            return plan
        factor = 1.0
        for _ in range(CORRECTIONS):
            if abs(plan.density - method.density) <= TOLERANCE:
                break
            factor *= method.density / plan.density
            corrected = map_density(method, lambda density, factor=factor: min(density * factor, 1.0))
            plan = self._make_full_plan(corrected, q, k, v, site, lengths).for_queries(site.first_query)
        return plan

    def _make_full_plan(
        self, method: Method, q: Tensor, k: Tensor, v: Tensor | None, site: Site, lengths: Tensor | None
    ) -> Plan | ClusterPlan | None:
        """Make a plan; if the batch holds both branches, from its second half, which is conditional."""
        memory, splits = self.memory(q, site), self._splits_batch(q, site)
        tensors = [q, k, v if method.needs_values else None]
        if splits:
            half = len(q) // 2
            *tensors, lengths = (None if x is None else x[half:] for x in (*tensors, lengths))
        if lengths is not None and not method.static:
            tensors = [None if x is None else without_padding(x, lengths) for x in tensors]
        plan = method.plan(*tensors, site, memory)
        return plan.repeat_batch() if splits and plan is not None else plan

    def _splits_batch(self, q: Tensor, site: Site) -> bool:
        return site.both_branches and len(q) % 2 == 0 and not self._schedule.per_branch

    def _key(self, q: Tensor, site: Site) -> tuple:
        branch = site.branch if self._schedule.per_branch else site.plan_group
        return site.grid, site.first_query, site.layer, branch, len(q) // 2 if self._splits_batch(q, site) else len(q)
