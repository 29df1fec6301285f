"""Decides how each intercepted attention call is computed, and computes it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from ..clusters import ClusterPlan
from ..grid import Grid, Site
from ..kernels.pick import Choice
from ..method import AttentionOutput
from ..plan import Plan
from .eligibility import why_dense
from .executor_choice import ExecutorChoices
from .forward import AttentionSite, Forward
from .intercept import Attend
from .padding import KeyLengths
from .plans import Plans
from .report import RunCounters
from .settings import Settings

if TYPE_CHECKING:  # imports diffusers, which takes seconds
    from .tracking import StepTracker

log = logging.getLogger("dit_sparse")

Observer = Callable[[Site, Tensor, Tensor, Plan | ClusterPlan], None]


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of an intercepted ``scaled_dot_product_attention`` call, and the original function ``sdpa``."""

    sdpa: Attend
    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def pairs(self) -> int:
        """Query-key pairs of all heads and batch items."""
        return self.query.shape[:3].numel() * self.key.shape[2]

    def compute_densely(self) -> Tensor:
        """Make the call that was intercepted."""
        inputs = (self.query, self.key, self.value, self.attn_mask, self.dropout_p, self.is_causal)
        return self.sdpa(*inputs, scale=self.scale, enable_gqa=self.enable_gqa)


class AttentionDispatcher:
    """Computes the attention calls of a run, sparsely where that is possible and faster.

    Args:
        settings: settings of the run.
        tracker: knows the step and branch.
        counters: count calls, pairs and time.

    Attributes:
        forward: the running transformer call.
        observers: called before every sparse call.
        last_plan: site and plan of the most recent sparse call, or None.
    """

    def __init__(self, settings: Settings, tracker: StepTracker, counters: RunCounters) -> None:
        self._settings, self._counters = settings, counters
        self.plans = Plans(settings.method, settings.schedule.per_branch, counters.planning)
        self.forward = Forward(settings, tracker)
        self.observers: list[Observer] = []
        self.last_plan: tuple[Site, Plan | ClusterPlan] | None = None
        self._choices = ExecutorChoices(settings, counters)
        self._lengths = KeyLengths()
        self._reserved_bytes: dict[str, int] = {}  # by branch of this generation
        self._logged_reasons: set[str] = set()

    def begin_forward(self, shape: tuple[int, int, int], batch: int) -> None:
        """Prepare for a transformer call with this token grid and batch size."""
        self.forward.begin(shape, batch)
        self._lengths.clear()

    def end_generation(self) -> None:
        """Drop everything that depends on the tokens of one generation."""
        self.plans.end_generation()
        self._lengths.clear()
        self._reserved_bytes.clear()
        self._choices.end_generation()

    def attend_for(self, attention_site: AttentionSite) -> Attend | None:
        """Return what computes the next call of a module, or None to leave a dense step to the user's backend."""
        backend = getattr(attention_site.module.processor, "_attention_backend", None)
        if backend not in (None, "native"):
            site = self.forward.site(attention_site, Grid(*self.forward.shape))
            if self._settings.schedule.is_dense(site):
                self._counters.count_dense(f"the schedule, by the backend {getattr(backend, 'value', backend)}", None)
                return None
        return partial(self._attend, attention_site)

    def _attend(self, attention_site: AttentionSite, *args, **kwargs) -> Tensor:
        """Compute an intercepted call; the arguments are those of :class:`AttentionCall`."""
        call, shape = AttentionCall(*args, **kwargs), self.forward.shape
        q, k = call.query, call.key
        grid = Grid(*shape).with_text(q.shape[2], attention_site.text)
        causal_or_dropout = call.is_causal or call.dropout_p > 0
        if reason := why_dense(shape, grid, q, k, causal_or_dropout, attention_site.module.processor):
            return self._dense(call, self._log_once(reason))
        site = self.forward.site(attention_site, grid)
        self.forward.count_call(attention_site)
        self._begin_generation(q, site)
        if self._settings.schedule.is_dense(site):
            return self._dense_step(call, site)
        if reason := self._settings.min_tokens_reason(grid) or self._choices.dense_reason(site):
            return self._dense(call, reason)
        lengths = self._lengths.read(call.attn_mask, len(q), grid)
        if isinstance(lengths, str):
            return self._dense(call, self._log_once(lengths))
        with self._counters.attention.timing(q.device):
            plan = self.plans.plan(q, k, site)
        if plan is None:
            return self._dense(call, "the method")
        plan = plan.with_lengths(lengths)
        choice = self._choices.for_plan(plan, q, k, site)
        if choice.name == "dense":
            return self._dense(call, self._choices.dense_reason(site))
        return self._sparse(call, site, plan, choice)

    def _begin_generation(self, q: Tensor, site: Site) -> None:
        """Let the method prepare at the first call of each branch of a generation."""
        if site.branch not in self._reserved_bytes:
            reserved = sum(self._reserved_bytes.values())
            self._reserved_bytes[site.branch] = self._settings.method.begin_generation(q, site, reserved)

    def _dense(self, call: AttentionCall, reason: str, compute: Callable[[], Tensor] | None = None) -> Tensor:
        """Count a call as dense for a reason and compute it, by default as the model would."""
        self._counters.count_dense(reason, call.pairs)
        with self._counters.attention.timing(call.query.device):
            return (compute or call.compute_densely)()

    def _dense_step(self, call: AttentionCall, site: Site) -> Tensor:
        """Compute a call of a dense step or layer, by an executor if one is faster than SDPA."""
        reason, q, k = "the schedule", call.query, call.key
        if not self._choices.may_replace_sdpa(site.grid):
            return self._dense(call, reason)
        lengths = self._lengths.read(call.attn_mask, len(q), site.grid)
        if isinstance(lengths, str):
            return self._dense(call, reason)
        choice, plan = self._choices.fastest_for_dense(q, k, lengths, site)
        if choice is None:
            return self._dense(call, reason)
        attend = partial(choice.executor.attend, q, k, call.value, plan, call.scale)
        return self._dense(call, f"{reason}, by the executor {choice.name}", lambda: attend()[0])

    def _sparse(self, call: AttentionCall, site: Site, plan: Plan | ClusterPlan, choice: Choice) -> Tensor:
        """Compute the pairs of a plan by the chosen executor and let the method correct the output."""
        q, k, v, counters = call.query, call.key, call.value, self._counters
        for observer in self.observers:
            observer(site, q, k, plan)
        self.last_plan = site, plan
        counters.count_sparse(site.grid, call.pairs, plan.mean_density, choice.name)
        attend = partial(choice.executor.attend, q, k, v, scale=call.scale)

        def attend_densely() -> tuple[Tensor, Tensor]:
            counters.computed_in_sparse += call.pairs
            return attend(plan=plan.full())

        with counters.attention.timing(q.device):
            output = AttentionOutput(q, k, v, plan, call.scale, *attend(plan=plan), attend_densely)
            return self._settings.method.correct(output, site, self.plans.memory(q, site))[0]

    def _log_once(self, reason: str) -> str:
        """Log a reason at its first occurrence and return it."""
        if reason not in self._logged_reasons:
            self._logged_reasons.add(reason)
            log.warning("attention stays dense: %s", reason)
        return reason
