"""The plans of a run: made when they are due, kept, and shared by the branches of guidance.

Guidance at scale g adds up g times what the branch of the prompt predicts and 1 - g times what the other one does. If
both lose the same by leaving blocks out, so does the sum; if their losses have nothing to do with each other, it loses
sqrt(g^2 + (1 - g)^2) times as much, five times at g = 4. Branches that compute the same blocks lose nearly the same.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch import Tensor

from ..clusters import ClusterPlan
from ..grid import Site
from ..method import Method
from ..plan import Plan
from .report import Stopwatch


@dataclass(frozen=True)
class CachedPlan:
    """A plan, and who asked for it when."""

    plan: Plan | ClusterPlan | None
    step: int
    branch: str

    def is_shared_by(self, site: Site) -> bool:
        """Whether it was made in this very step, for the other branch. Where the same one asks twice a step, as when a
        long video is denoised window by window, that is another part of the video."""
        return self.step == site.step and self.branch != site.branch


class Plans:
    """What was planned and what methods remember, by layer, grid and branches; static plans by the grid alone.

    Plans stay on the device of the queries, or on the CPU between calls where ``aside`` says so.
    """

    def __init__(
        self, method: Method, per_branch: bool = False, stopwatch: Stopwatch | None = None, offload: bool = False
    ) -> None:
        self.method, self._per_branch, self._offload = method, per_branch, offload
        self._stopwatch = stopwatch or Stopwatch()
        self._made: dict[tuple, CachedPlan] = {}
        self._memory: dict[tuple, dict] = defaultdict(dict)

    def plan(self, q: Tensor, k: Tensor, site: Site) -> Plan | ClusterPlan | None:
        """The plan for ``q, k [B, H, N, D]``, made anew where that is due."""
        method = self.method
        key = (site.grid, q.device) if method.static else (*self._key(q, site), len(q), q.device)
        made = self._made.get(key)
        due = not method.static and (method.manages_own_plans or site.needs_plan)
        if made is None or (due and not made.is_shared_by(site)):
            with self._stopwatch.timing(q.device):
                plan = self._make_plan(q, k, site)
            kept = plan.to("cpu") if self._offload and plan is not None else plan
            self._made[key] = CachedPlan(kept, site.step, site.branch)
            return plan
        return made.plan.to(q.device) if self._offload and made.plan is not None else made.plan

    def memory(self, q: Tensor, site: Site) -> dict:
        """What the method remembers where q comes from."""
        return self._memory[self._key(q, site)]

    def forget(self) -> None:
        """A generation is over: what was learnt from its tokens goes; static plans know only the grid, and stay."""
        self._memory.clear()
        if not self.method.static:
            self._made.clear()

    def _make_plan(self, q: Tensor, k: Tensor, site: Site) -> Plan | ClusterPlan | None:
        """A new plan. Of a batch that holds both branches the second half, which is that of the prompt, decides."""
        memory, half = self.memory(q, site), len(q) // 2
        if not self._splits_batch(q, site):
            return self.method.plan(q, k, site, memory)
        plan = self.method.plan(q[half:], k[half:], site, memory)
        return plan if plan is None else plan.repeat_batch()

    def _splits_batch(self, q: Tensor, site: Site) -> bool:
        return site.both_branches and len(q) % 2 == 0 and not self._per_branch

    def _key(self, q: Tensor, site: Site) -> tuple:
        branch = site.branch if self._per_branch else site.plan_group
        return site.grid, site.layer, branch, len(q) // 2 if self._splits_batch(q, site) else len(q)
