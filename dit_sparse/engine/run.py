"""One pipeline made sparse: where its attention calls go, what they share, and the way back."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..grid import Grid, Site
from ..kernels.pick import Choice, pick
from ..method import AttentionOutput, Method
from ..methods import name_of
from ..pipelines.family import Family, Shape
from ..plan import Plan
from ..schedule import Schedule
from .eligibility import read_padding, why_dense
from .intercept import Attend, intercept_attention
from .plans import Plans
from .report import Report, RunCounters

log = logging.getLogger("dit_sparse")

SMALL_SEQUENCE = 32_768  # tokens; below it blocks of 64 lose little speed and choose more finely than 128

Observer = Callable[[Site, Tensor, Tensor, Plan], None]


@dataclass(frozen=True)
class Settings:
    """What a run does; see ``SparseAttnProcessor`` for the meaning."""

    method: Method
    schedule: Schedule
    executor: str
    block: int | None
    min_tokens: int | None
    steps: int | None

    @property
    def density_varies(self) -> bool:
        """Whether the density may differ from clip to clip."""
        return not self.method.static and self.method.density is None

    def block_for(self, grid: Grid) -> int:
        return self.block or (64 if grid.tokens < SMALL_SEQUENCE else 128)

    def min_tokens_reason(self, grid: Grid) -> str | None:
        least = self.min_tokens or 0
        return f"fewer than {least} tokens" if grid.tokens < least else None


@dataclass(frozen=True)
class AttentionSite:
    """One self-attention module: of which transformer, which layer of how many, and on which side its text stands."""

    component: str
    layer: int
    layers: int
    text: str | None
    module: nn.Module


class Run:
    """One pipeline made sparse: its state, and the way back. State lives here and is dropped when a generation ends,
    fails or starts anew."""

    def __init__(
        self,
        settings: Settings,
        timesteps: Callable[[], Any],
        guided: Callable[[], bool],
        transformers: Iterable[tuple[str, nn.Module, Family]],
    ) -> None:
        from .tracking import StepTracker  # here, for it imports diffusers, which takes seconds

        self._settings = settings
        self._counters = RunCounters()
        self._plans = Plans(settings.method, settings.schedule.per_branch, self._counters.planning)
        self._choices: dict[tuple, Choice] = {}
        self._full_plans: dict[tuple, tuple[Choice, Plan]] = {}
        self._stay_dense: dict[tuple, str] = {}
        self._lengths: dict[int, tuple[Tensor, Tensor | str]] = {}
        self._batch_items: Counter[nn.Module] = Counter()  # Mochi attends one batch item at a time: which one is this?
        self._warned: set[str] = set()
        self._reserved_bytes: dict[str, int] = {}  # branches of this generation, and bytes promised to each
        self._undo: list = []
        self._observers: list[Observer] = []
        self._tracker = StepTracker(timesteps, guided, settings.steps, self._forget)
        self._grid: Shape = (1, 1, 1)
        self._batch = 1
        try:
            for name, transformer, family in transformers:
                self._attach(name, transformer, family)
        except BaseException:
            self.disable()
            raise

    def disable(self) -> None:
        """Put everything back as it was; safe to call twice."""
        while self._undo:
            self._undo.pop()()
        self._forget()

    def report(self) -> Report:
        """What happened so far."""
        counters, method = self._counters, self._settings.method
        return Report(
            method=name_of(method),
            settings=method.settings(),
            executors=dict(counters.executors),
            choices=dict(counters.choices),
            grids=list(counters.grids),
            sparse_calls=counters.sparse_calls,
            dense_calls=dict(counters.dense),
            density_asked=method.density,
            density_achieved=counters.density_achieved,
            density_run=counters.density_run,
            attention_seconds=counters.attention.seconds,
            planning_seconds=counters.planning.seconds,
        )

    def observe(self, observer: Observer) -> None:
        """Call ``observer(site, q, k, plan)`` before every sparse call, outside its timing: for measurements."""
        self._observers.append(observer)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.disable()

    def _attach(self, name: str, transformer: nn.Module, family: Family) -> None:
        from .tracking import RootHook, register_root_hook

        def on_forward(arguments: dict) -> None:
            self._grid = family.grid(transformer.config, arguments)
            self._batch = len(arguments["hidden_states"])
            self._lengths.clear()
            self._batch_items.clear()

        self._undo.append(register_root_hook(transformer, RootHook(self._tracker, on_forward)))
        sites = [(path, module) for path, module in transformer.named_modules() if re.fullmatch(family.sites, path)]
        self._settings.method.check_model(len(sites), getattr(sites[0][1], "heads", 0) if sites else 0)
        for layer, (_, module) in enumerate(sites):
            module_site = AttentionSite(name, layer, len(sites), family.text, module)
            self._undo.append(intercept_attention(module, partial(self._decide, module_site)))

    def _decide(self, module_site: AttentionSite) -> Attend | None:
        """Who computes the coming call: this run, or, in dense steps, the attention backend that the user chose."""
        backend = getattr(module_site.module.processor, "_attention_backend", None)
        dense = self._settings.schedule.is_dense
        if backend in (None, "native") or not dense(self._site(module_site, Grid(*self._grid))):
            return partial(self._attend, module_site)
        self._counters.count_dense(f"the schedule, by the backend {getattr(backend, 'value', backend)}", None)
        return None

    def _site(self, module_site: AttentionSite, grid: Grid) -> Site:
        tracker, block = self._tracker, self._settings.block_for(grid)
        turn = self._batch_items[module_site.module]
        branch = f"{module_site.component} {tracker.branch} {turn}"
        pair = (
            f"{module_site.component} {tracker.plan_group} {turn % (self._batch // (1 + tracker.both_branches) or 1)}"
        )
        site = Site(
            grid,
            block,
            module_site.layer,
            module_site.layers,
            tracker.step,
            tracker.steps,
            branch,
            pair,
            tracker.both_branches,
        )
        return replace(site, needs_plan=self._settings.schedule.needs_plan(site))

    def _attend(
        self, module_site: AttentionSite, sdpa: Attend, query: Tensor, key: Tensor, value: Tensor,
        attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """What a diverted attention call becomes: sparse where that is possible and pays, else the call it was."""
        pairs = query.shape[2] * key.shape[2] * query.shape[0] * query.shape[1]

        def as_it_was() -> Tensor:
            return sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

        def dense(reason: str, attend: Callable[[], Tensor] = as_it_was) -> Tensor:
            self._counters.count_dense(reason, pairs)
            with self._counters.attention.timing(query.device):
                return attend()

        grid = Grid(*self._grid).with_text(query.shape[2], module_site.text)
        if reason := why_dense(self._grid, grid, query, key, is_causal or dropout_p > 0, module_site.module.processor):
            return dense(self._warn_once(reason))
        site = self._site(module_site, grid)
        self._batch_items[module_site.module] += 1
        if site.branch not in self._reserved_bytes:
            self._reserved_bytes[site.branch] = self._settings.method.begin_generation(
                query, site, sum(self._reserved_bytes.values())
            )
        if self._settings.schedule.is_dense(site):
            if (quicker := self._fastest_for_dense(query, key, attn_mask, site)) is None:
                return dense("the schedule")
            choice, whole = quicker
            attend = partial(choice.executor.attend, query, key, value, whole, scale)
            return dense(f"the schedule, by the executor {choice.name}", lambda: attend()[0])
        if reason := self._settings.min_tokens_reason(grid) or self._stay_dense.get((site.grid, site.layer)):
            return dense(reason)
        lengths = self._key_lengths(attn_mask, query, grid)
        if isinstance(lengths, str):
            return dense(self._warn_once(lengths))
        with self._counters.attention.timing(query.device):
            plan = self._plans.plan(query, key, site)
        if plan is None:
            return dense("the method")
        plan = plan.with_lengths(lengths)
        choice = self._choice(plan, query, key, site)
        if choice.name == "dense":
            return dense(self._stay_dense[site.grid, site.layer])
        for observer in self._observers:
            observer(site, query, key, plan)
        self._counters.count_sparse(grid, pairs, plan.mean_density)
        with self._counters.attention.timing(query.device):
            self._counters.executors[choice.name] += 1
            attend = partial(choice.executor.attend, query, key, value, scale=scale)

            def attend_all() -> tuple[Tensor, Tensor]:
                self._counters.computed_in_sparse += pairs
                return attend(plan=plan.full())

            done = AttentionOutput(query, key, value, plan, scale, *attend(plan=plan), attend_all)
            return self._settings.method.correct(done, site, self._plans.memory(query, site))[0]

    def _choice(self, plan: Plan, q: Tensor, k: Tensor, site: Site) -> Choice:
        """Who computes such calls of this layer. Found at the first of them, for on a GPU it waits for the device."""
        call = (site.grid, site.layer, q.shape, q.dtype, q.device, type(plan), plan.lengths is None)
        if call not in self._choices:
            or_dense, lse = self._settings.min_tokens is None, self._settings.method.needs_lse
            choice = pick(self._settings.executor, q, k, plan, or_dense=or_dense, lse=lse)
            self._choices[call] = choice
            if self._settings.executor == "auto":
                self._counters.choices[f"{choice.name}: {choice.reason}"] += 1
            if choice.name == "dense":
                self._stay_dense[site.grid, site.layer] = "faster here, by what was measured"
        return self._choices[call]

    def _fastest_for_dense(self, q: Tensor, k: Tensor, mask: Tensor | None, site: Site) -> tuple[Choice, Plan] | None:
        """Who computes all pairs of a dense step faster than torch's own attention, by what "auto" has measured on this
        machine, and the plan that says so; None: nobody."""
        settings = self._settings
        if (
            settings.executor != "auto"
            or settings.method.keeps_model_attention
            or settings.min_tokens_reason(site.grid)
        ):
            return None
        lengths = self._key_lengths(mask, q, site.grid)
        if isinstance(lengths, str):
            return None
        call = (site.grid, q.shape, q.dtype, q.device, lengths is None)
        if call not in self._full_plans:
            whole = Plan.dense(site.grid.tokens, site.block, q.device)
            choice = pick("auto", q, k, whole.with_lengths(lengths), or_dense=True)
            self._counters.choices[f"{choice.name}: {choice.reason}"] += 1
            self._full_plans[call] = choice, whole
        choice, whole = self._full_plans[call]
        return None if choice.name == "dense" else (choice, whole.with_lengths(lengths))

    def _key_lengths(self, mask: Tensor | None, q: Tensor, grid: Grid) -> Tensor | str | None:
        """Real keys of each batch item from a padding mask, ``[B]``; None: no padding; a string: why the mask cannot be
        read so. One look at each mask and transformer call, for on a GPU it waits for the device."""
        if mask is None:
            return None
        if id(mask) not in self._lengths:
            self._lengths[id(mask)] = (mask, read_padding(mask, q.shape[0], grid))
        return self._lengths[id(mask)][1]

    def _warn_once(self, reason: str) -> str:
        if reason not in self._warned:
            self._warned.add(reason)
            log.warning("attention stays dense: %s", reason)
        return reason

    def _forget(self) -> None:
        """A generation is over, and what was learnt from its tokens goes."""
        self._plans.forget()
        self._lengths.clear()
        self._reserved_bytes.clear()
        if self._settings.density_varies:  # which clip came first must not matter
            self._choices.clear()
            self._stay_dense.clear()
