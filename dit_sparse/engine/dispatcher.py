"""Decides how each intercepted attention call is computed, and computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..clusters import ClusterPlan
from ..composition import check_grid
from ..grid import BaseGrid, Site
from ..kernels.pick import Choice
from ..method import AttentionOutput
from ..plan import Plan
from .executor_choice import ExecutorChoices
from .forward import AttentionCall, AttentionSite, Forward, TokenLayout, why_dense
from .guard import QualityGuard
from .interception.parallel import arrange, joint_order
from .items import ItemLayout, check_attention
from .masks.causal import CausalParts, with_missing_queries
from .masks.padding import KeyPadding, MaskCache
from .plans import Plans
from .report import RunCounters
from .settings import Settings
from .tracking import StepTracker

Observer = Callable[[Site, Tensor, Tensor, Plan | ClusterPlan], None]


class AttentionDispatcher:
    """Computes the attention calls of a run in one thread, sparsely where that is possible and faster.

    Args:
        settings: settings of the run.
        counters: count calls, pairs and time.
        observers: called before every sparse call.
        scheduler: returns the pipeline's scheduler, or None.
        guided: returns whether a pipeline that batches both branches of guidance computes them now.
        default_steps: number of steps if neither the settings nor a scheduler gives it.

    Attributes:
        tracker: the step and branch of the running transformer call.
        last_plan: site and plan of the most recent sparse call, or None.
    """

    def __init__(
        self,
        settings: Settings,
        counters: RunCounters,
        observers: Sequence[Observer],
        scheduler: Callable[[], Any],
        guided: Callable[[], bool],
        default_steps: int | None = None,
    ) -> None:
        self._settings, self._counters, self._observers = settings, counters, observers
        self.tracker = StepTracker(scheduler, guided, settings.steps, self.end_generation, default_steps)
        self.last_plan: tuple[Site, Plan | ClusterPlan] | None = None
        self._guard = QualityGuard(settings.guard, settings.method.density is not None, counters)
        self._plans = Plans(settings.method, settings.schedule, counters.planning, guard=self._guard)
        self._forward = Forward(settings, self.tracker)
        self._choices = ExecutorChoices(settings, counters)
        self._masks = MaskCache()
        self._checked_attention = False
        self._reserved_bytes: dict[str, int] = {}  # by branch of this generation

    def begin_forward(
        self, timestep: Any, latents: Any, layout: TokenLayout | ItemLayout, context: Any, compiled: bool = False
    ) -> None:
        """Prepare for a transformer call with these tokens; the other arguments are those of the tracker.

        Raises:
            ValueError: the method does not apply to the grid of an item.
        """
        is_plain = isinstance(layout, ItemLayout)
        for grid in layout.grids if is_plain else ():
            check_grid(self._settings.method, grid)
        self.tracker.begin_forward(timestep, latents, context, compiled)
        self._forward.begin(layout, batch=layout.items if is_plain else len(latents))
        self._masks.clear()
        self._guard.begin_forward()

    def end_generation(self) -> None:
        """Drop everything that depends on the tokens of one generation."""
        self._plans.end_generation()
        self._masks.clear()
        self._reserved_bytes.clear()
        self._guard.end_generation()
        self._choices.end_generation()

    def attend(self, attention_site: AttentionSite, call: AttentionCall) -> Tensor:
        """Compute an intercepted call, ``[B, H, N, D]``."""
        device = call.q.device.type
        if not torch.is_autocast_enabled(device):
            return self._attend(attention_site, call)
        dtype = torch.get_autocast_dtype(device)  # SDPA casts to this dtype; executors do not cast
        with torch.autocast(device, enabled=False):
            return self._attend(attention_site, call.under_autocast(device, dtype))

    def _attend(self, attention_site: AttentionSite, call: AttentionCall) -> Tensor:
        if not self.tracker.in_forward:
            return self._dense(call, self._counters.warn("the forward call of the transformer was not observed"))
        layout = self._forward.layout
        if isinstance(layout, ItemLayout):
            return self._attend_items(attention_site, call, layout)
        grid = layout.grid(call.k.shape[2], attention_site.text)
        if reason := why_dense(layout, grid, call, attention_site.cached_keys):
            return self._dense(call, self._counters.warn(reason))
        site, call = self._next_site(attention_site, grid), replace(call, packed_text=attention_site.packed_text)
        if call.share is None:
            return self._attend_at(call, site)
        site = replace(site, first_head=call.share.first)
        order = joint_order(call.share.ranks, grid, layout, call.q.device)
        if order is None:
            return self._attend_at(call, site)
        return self._attend_at(arrange(call, order), site).index_select(2, order.argsort())

    def _attend_items(self, attention_site: AttentionSite, call: AttentionCall, layout: ItemLayout) -> Tensor:
        """Compute a call of a plain module item by item."""
        parts = layout.split(call)
        if isinstance(parts, str):
            return self._dense(call, self._counters.warn(parts))
        if self._settings.method.keeps_model_attention:
            return self._dense(call, "the method")
        if not call.is_checked and not self._checked_attention:
            check_attention(call, parts, layout)
            self._checked_attention = True
        outputs = []
        for part, grid in parts:
            if reason := why_dense(grid, grid, part):
                outputs.append(self._dense(part, self._counters.warn(reason)))
            else:
                outputs.append(self._attend_at(part, self._next_site(attention_site, grid)))
        return layout.merge(outputs)

    def _next_site(self, attention_site: AttentionSite, grid: BaseGrid) -> Site:
        """Return the site of the next call of a module, and count the call."""
        site = self._forward.site(attention_site, grid)
        self._forward.count_call(attention_site)
        return site

    def _attend_at(self, call: AttentionCall, site: Site) -> Tensor:
        """Compute a call whose tokens fit the grid of the site."""
        self._begin_generation(call.q, site)
        if self._settings.schedule.is_dense(site):
            out = self._dense_step(call, site)
            if self._settings.method.observes_dense and self._settings.schedule.is_last_dense(site):
                self._observe_dense(call, site, out)
            return out
        if reason := self._why_site_is_dense(site):
            return self._dense(call, reason)
        if self._settings.method.keeps_model_attention:
            return self._dense(call, "the method")
        padding = self._masks.read(call, site.grid)
        if isinstance(padding, str):
            return self._dense(call, self._counters.warn(padding))
        if isinstance(padding, CausalParts):
            outputs = [self._attend_part(*part) for part in padding.split(call, site)]
            return padding.merge(outputs, call.q.shape[2])
        if call.q.shape[2] < call.k.shape[2]:
            return self._attend_last_queries(with_missing_queries(call), site)
        if padding is None or padding.order is None:
            return self._attend_sparsely(call, site, padding)
        return padding.restore(self._attend_sparsely(padding.arrange_call(call), padding.arrange_site(site), padding))

    def _attend_last_queries(self, call: AttentionCall, site: Site) -> Tensor:
        """Compute a call of which only the outputs from its first used query on are used, and return these."""
        out = self._attend_sparsely(call, replace(site, first_query=call.first_query), None)
        return out[:, :, call.first_query - call.k.shape[2] :]

    def _attend_part(self, call: AttentionCall, site: Site | None) -> Tensor:
        """Compute a part of a causal call, see `CausalParts.split`."""
        reason = "the keys hold no video token" if site is None else self._why_site_is_dense(site)
        return self._dense(call, reason) if reason else self._attend_sparsely(call, site, None)

    def _why_site_is_dense(self, site: Site) -> str | None:
        return (
            self._settings.min_tokens_reason(site.grid)
            or self._choices.dense_reason(site)
            or self._guard.dense_reason(site)
        )

    def _attend_sparsely(self, call: AttentionCall, site: Site, padding: KeyPadding | None) -> Tensor:
        """Compute a call whose padding is at the end by the method's plan, if there is one and it is faster."""
        q, k, lengths = call.q, call.k, padding and padding.lengths
        with self._counters.attention.timing(q.device):
            plan = self._plans.plan(q, k, site, lengths, call.v)
        if plan is None:
            return self._dense(call, "the method")
        plan = plan.with_lengths(lengths)
        choice = self._choices.for_plan(plan, q, k, site)
        if choice.name == "dense":
            return self._dense(call, self._choices.dense_reason(site))
        self._guard.measure(call, site, plan)
        return self._sparse(call, site, plan, choice)

    def _begin_generation(self, q: Tensor, site: Site) -> None:
        """Let the method prepare at the first call of each branch of a generation."""
        if site.branch not in self._reserved_bytes:
            reserved = sum(self._reserved_bytes.values())
            self._reserved_bytes[site.branch] = self._settings.method.begin_generation(q, site, reserved)

    def _dense(self, call: AttentionCall, reason: str, compute: Callable[[], Tensor] | None = None) -> Tensor:
        self._counters.count_dense(reason, call.pairs)
        with self._counters.attention.timing(call.q.device):
            return (compute or call.stock)()

    def _dense_step(self, call: AttentionCall, site: Site) -> Tensor:
        """Compute a call of a dense step or layer: by an executor if one is faster than SDPA, else without padding."""
        reason, q, k = "the schedule", call.q, call.k
        if call.backend is not None:
            return self._dense(call, f"{reason}, by the backend {call.backend}")
        if not self._choices.may_replace_sdpa(site.grid):
            return self._dense(call, reason)
        padding = self._masks.read(call, site.grid)
        if isinstance(padding, str | CausalParts) or call.q.shape[2] < call.k.shape[2]:
            return self._dense(call, reason)
        without_padding = partial(padding.attend_without_padding, call) if padding else None
        if padding is not None and padding.order is not None:
            return self._dense(call, reason, without_padding)
        choice, plan = self._choices.fastest_for_dense(q, k, padding and padding.lengths, site)
        if choice is None:
            return self._dense(call, reason, without_padding)
        attend = partial(choice.executor.attend, q, k, call.v, plan, call.scale)
        return self._dense(call, f"{reason}, by the executor {choice.name}", lambda: attend()[0])

    def _observe_dense(self, call: AttentionCall, site: Site, out: Tensor) -> None:
        """Call ``observe_dense`` with a call of the last dense step and the output of the method's plan for it."""
        padding, counters = self._masks.read(call, site.grid), self._counters
        if self._why_site_is_dense(site) or isinstance(padding, str | CausalParts) or call.q.shape[2] < call.k.shape[2]:
            return
        if padding is not None and padding.order is not None:
            call, site, out = padding.arrange_call(call), padding.arrange_site(site), padding.arrange(out)
        q, k, v, lengths = call.q, call.k, call.v, padding and padding.lengths
        with counters.attention.timing(q.device):
            plan = self._plans.preview(q, k, site, lengths, v)
        if plan is None:
            return
        plan = plan.with_lengths(lengths)
        choice = self._choices.for_plan(plan, q, k, site)
        if choice.name == "dense":
            return
        with counters.attention.timing(q.device):
            counters.count_observation(call.pairs * plan.mean_density)
            output, lse = choice.executor.attend(q, k, v, plan, call.scale)
            result = AttentionOutput(q, k, v, plan, call.scale, output, lse, lambda: (out, None))
            self._settings.method.observe_dense(result, site, self._plans.memory(q, site))

    def _sparse(self, call: AttentionCall, site: Site, plan: Plan | ClusterPlan, choice: Choice) -> Tensor:
        q, k, v, counters = call.q, call.k, call.v, self._counters
        for observer in self._observers:
            observer(site, q, k, plan)
        self.last_plan = site, plan
        counters.count_density(site, self._plans.density_at(site))
        counters.count_sparse(site, call.pairs, plan, choice.name)
        attend = partial(choice.executor.attend, q, k, v, scale=call.scale)

        def attend_densely() -> tuple[Tensor, Tensor]:
            counters.computed_in_sparse = counters.computed_in_sparse + call.pairs
            return attend(plan=plan.full())

        with counters.attention.timing(q.device):
            output = AttentionOutput(q, k, v, plan, call.scale, *attend(plan=plan), attend_densely)
            return self._settings.method.correct(output, site, self._plans.memory(q, site))[0]
