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
from ..method import Computed, Method
from ..methods import name_of
from ..pipelines.family import Family, Shape
from ..plan import Plan
from ..schedule import Schedule
from .eligibility import obstacle, read_padding
from .intercept import Attend, divert
from .plans import Plans
from .report import Report, Tally

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

    def too_short(self, grid: Grid) -> str | None:
        least = self.min_tokens or 0
        return f"fewer than {least} tokens" if grid.tokens < least else None


@dataclass(frozen=True)
class Place:
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
        from .tracking import Whereabouts  # here, for it imports diffusers, which takes seconds

        self._settings = settings
        self._tally = Tally()
        self._plans = Plans(settings.method, settings.schedule.per_branch, self._tally.planning)
        self._choices: dict[tuple, Choice] = {}
        self._whole: dict[tuple, tuple[Choice, Plan]] = {}
        self._stay_dense: dict[tuple, str] = {}
        self._lengths: dict[int, tuple[Tensor, Tensor | str]] = {}
        self._turns: Counter[nn.Module] = Counter()  # Mochi attends one batch item at a time: which one is this?
        self._warned: set[str] = set()
        self._begun: dict[str, int] = {}  # branches of this generation, and bytes promised to each
        self._undo: list = []
        self._observers: list[Observer] = []
        self._clock = Whereabouts(timesteps, guided, settings.steps, self._forget)
        self._grid: Shape = (1, 1, 1)
        self._batch = 1
        try:
            for name, transformer, family in transformers:
                self._watch(name, transformer, family)
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
        tally, method = self._tally, self._settings.method
        return Report(
            method=name_of(method),
            settings=method.settings(),
            executors=dict(tally.executors),
            choices=dict(tally.choices),
            grids=list(tally.grids),
            sparse_calls=tally.sparse_calls,
            dense_calls=dict(tally.dense),
            density_asked=method.density,
            density_achieved=tally.density_achieved,
            density_run=tally.density_run,
            attention_seconds=tally.attention.seconds,
            planning_seconds=tally.planning.seconds,
        )

    def observe(self, observer: Observer) -> None:
        """Call ``observer(site, q, k, plan)`` before every sparse call, outside its timing: for measurements."""
        self._observers.append(observer)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.disable()

    def _watch(self, name: str, transformer: nn.Module, family: Family) -> None:
        from .tracking import RootHook, watch

        def entered(arguments: dict) -> None:
            self._grid = family.grid(transformer.config, arguments)
            self._batch = len(arguments["hidden_states"])
            self._lengths.clear()
            self._turns.clear()

        self._undo.append(watch(transformer, RootHook(self._clock, entered)))
        sites = [(path, module) for path, module in transformer.named_modules() if re.fullmatch(family.sites, path)]
        self._settings.method.fits(len(sites), getattr(sites[0][1], "heads", 0) if sites else 0)
        for layer, (_, module) in enumerate(sites):
            place = Place(name, layer, len(sites), family.text, module)
            self._undo.append(divert(module, partial(self._decide, place)))

    def _decide(self, place: Place) -> Attend | None:
        """Who computes the coming call: this run, or, in dense steps, the attention backend that the user chose."""
        backend = getattr(place.module.processor, "_attention_backend", None)
        if backend in (None, "native") or not self._settings.schedule.dense(self._site(place, Grid(*self._grid))):
            return partial(self._attend, place)
        self._tally.stayed_dense(f"the schedule, by the backend {getattr(backend, 'value', backend)}", None)
        return None

    def _site(self, place: Place, grid: Grid) -> Site:
        clock, block = self._clock, self._settings.block_for(grid)
        turn = self._turns[place.module]
        branch = f"{place.component} {clock.branch} {turn}"
        pair = f"{place.component} {clock.pair} {turn % (self._batch // (1 + clock.both) or 1)}"
        site = Site(grid, block, place.layer, place.layers, clock.step, clock.steps, branch, pair, clock.both)
        return replace(site, due=self._settings.schedule.replan(site))

    def _attend(
        self, place: Place, sdpa: Attend, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """What a diverted attention call becomes: sparse where that is possible and pays, else the call it was."""
        pairs = query.shape[2] * key.shape[2] * query.shape[0] * query.shape[1]

        def as_it_was() -> Tensor:
            return sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

        def dense(reason: str, attend: Callable[[], Tensor] = as_it_was) -> Tensor:
            self._tally.stayed_dense(reason, pairs)
            with self._tally.attention.running(query.device):
                return attend()

        grid = Grid(*self._grid).with_text(query.shape[2], place.text)
        if reason := obstacle(self._grid, grid, query, key, is_causal or dropout_p > 0, place.module.processor):
            return dense(self._warn_once(reason))
        site = self._site(place, grid)
        self._turns[place.module] += 1
        if site.branch not in self._begun:
            self._begun[site.branch] = self._settings.method.begin(query, site, sum(self._begun.values()))
        if self._settings.schedule.dense(site):
            if (quicker := self._quicker(query, key, attn_mask, site)) is None:
                return dense("the schedule")
            choice, whole = quicker
            attend = partial(choice.executor.attend, query, key, value, whole, scale)
            return dense(f"the schedule, by the executor {choice.name}", lambda: attend()[0])
        if reason := self._settings.too_short(grid) or self._stay_dense.get((site.grid, site.layer)):
            return dense(reason)
        lengths = self._key_lengths(attn_mask, query, grid)
        if isinstance(lengths, str):
            return dense(self._warn_once(lengths))
        with self._tally.attention.running(query.device):
            plan = self._plans.plan(query, key, site)
        if plan is None:
            return dense("the method")
        plan = plan.padded(lengths)
        choice = self._choice(plan, query, key, site)
        if choice.name == "dense":
            return dense(self._stay_dense[site.grid, site.layer])
        for observer in self._observers:
            observer(site, query, key, plan)
        self._tally.computed(grid, pairs, plan.share)
        with self._tally.attention.running(query.device):
            self._tally.executors[choice.name] += 1
            attend = partial(choice.executor.attend, query, key, value, scale=scale)

            def whole() -> tuple[Tensor, Tensor]:
                self._tally.computed_in_sparse += pairs
                return attend(plan=plan.whole())

            done = Computed(query, key, value, plan, scale, *attend(plan=plan), whole)
            return self._settings.method.correct(done, site, self._plans.memory(query, site))[0]

    def _choice(self, plan: Plan, q: Tensor, k: Tensor, site: Site) -> Choice:
        """Who computes such calls of this layer. Found at the first of them, for on a GPU it waits for the device."""
        call = (site.grid, site.layer, q.shape, q.dtype, q.device, type(plan), plan.lengths is None)
        if call not in self._choices:
            or_dense, lse = self._settings.min_tokens is None, self._settings.method.needs_lse
            choice = pick(self._settings.executor, q, k, plan, or_dense=or_dense, lse=lse)
            self._choices[call] = choice
            if self._settings.executor == "auto":
                self._tally.choices[f"{choice.name}: {choice.reason}"] += 1
            if choice.name == "dense":
                self._stay_dense[site.grid, site.layer] = "faster here, by what was measured"
        return self._choices[call]

    def _quicker(self, q: Tensor, k: Tensor, mask: Tensor | None, site: Site) -> tuple[Choice, Plan] | None:
        """Who computes all pairs of a dense step faster than torch's own attention, by what "auto" has measured on this
        machine, and the plan that says so; None: nobody."""
        settings = self._settings
        if settings.executor != "auto" or settings.method.untouched or settings.too_short(site.grid):
            return None
        lengths = self._key_lengths(mask, q, site.grid)
        if isinstance(lengths, str):
            return None
        call = (site.grid, q.shape, q.dtype, q.device, lengths is None)
        if call not in self._whole:
            whole = Plan.full(site.grid.tokens, site.block, q.device)
            choice = pick("auto", q, k, whole.padded(lengths), or_dense=True)
            self._tally.choices[f"{choice.name}: {choice.reason}"] += 1
            self._whole[call] = choice, whole
        choice, whole = self._whole[call]
        return None if choice.name == "dense" else (choice, whole.padded(lengths))

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
        self._begun.clear()
        if self._settings.density_varies:  # which clip came first must not matter
            self._choices.clear()
            self._stay_dense.clear()
