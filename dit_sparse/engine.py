"""Turning a pipeline sparse and back."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .grid import Grid, Site
from .kernels.pick import executor as executor_named
from .kernels.pick import pick
from .method import Method
from .methods import method as method_named
from .methods import name_of
from .pipelines.family import Family, SetAttnProcessor, family_of
from .plan import Plan
from .report import Report, Tally
from .schedule import Schedule
from .seam import Attend, divert

log = logging.getLogger("dit_sparse")

DEFAULT_DENSITY = 0.25
SMALL_SEQUENCE = 32_768  # tokens; below it blocks of 64 lose little speed and choose more finely than 128
BREAK_EVEN = {"cpu": 512, "cuda": 4096}  # tokens; below it sparse does not pay


Observer = Callable[[Site, Tensor, Tensor, Plan], None]


class SparseAttnProcessor:
    """What to do, as a value: for ``pipe.set_attn_processor``, and behind :func:`enable`."""

    def __init__(
        self,
        method: str | Method = "radial",
        *,
        density: float | None = None,
        schedule: Schedule | None = None,
        dense_steps: int | float | None = None,
        dense_layers: int | float | None = None,
        executor: str = "auto",
        block: int | None = None,
        min_tokens: int | None = None,
        steps: int | None = None,
        **settings: Any,
    ) -> None:
        """
        Args:
            method: a name from ``dit_sparse.METHODS``, with ``settings`` of its own, or a Method.
            density: fraction of the query-key pairs to compute; 0.25 where neither it nor a setting is given.
            schedule: when to stay dense; ``dense_steps`` and ``dense_layers`` are short for parts of it.
            executor: what computes the plans: "auto", or a name that runs or raises.
            block: tokens in a block, 16 to 256; None: 64 below 32,768 tokens, else 128.
            min_tokens: shorter sequences stay dense; None: the device's break-even.
            steps: number of denoising steps, needed only where neither pipeline nor scheduler tells it.

        Raises:
            ValueError: anything unknown or out of range, in one sentence.
        """
        self.method = _resolve(method, density, settings)
        schedule = schedule or Schedule()
        given = {"dense_steps": dense_steps, "dense_layers": dense_layers}
        self.schedule = replace(schedule, **{name: value for name, value in given.items() if value is not None})
        if executor != "auto":
            executor_named(executor)
        if block is not None and (block < 16 or block > 256 or block % 16):
            raise ValueError(f"block is a multiple of 16 from 16 to 256 tokens, not {block}")
        self.executor, self.block, self.min_tokens, self.steps = executor, block, min_tokens, steps

    def attach(self, model: Any) -> Run:
        """Make ``model``, a diffusers pipeline or transformer, sparse."""
        return Run(self, model)


def enable(model: Any, method: str | Method = "radial", **settings: Any) -> Run:
    """Make a diffusers pipeline, or a bare transformer, sparse.

    Takes the arguments of :class:`SparseAttnProcessor`. The returned run reports, and ``run.disable()`` (or leaving
    ``with``) restores the model bit for bit. A run that is active on the model already is ended first.
    """
    processor = SparseAttnProcessor(method, **settings)
    if not hasattr(model, "components"):
        return processor.attach(model)
    prepare(model).set_attn_processor(processor)
    return model.sparse_run


def prepare(pipe: Any) -> Any:
    """Give this pipeline object ``set_attn_processor``; returns it."""
    _transformers(pipe)
    if not hasattr(pipe, "set_attn_processor"):
        pipe.__dict__["set_attn_processor"] = MethodType(SetAttnProcessor.set_attn_processor, pipe)
        pipe.__dict__["sparse_run"] = None
    return pipe


class Run:
    """One pipeline made sparse: its state, and the way back. State lives here, keyed by layer, branch and grid, and is
    dropped when a generation ends, fails or starts anew."""

    def __init__(self, settings: SparseAttnProcessor, model: Any) -> None:
        from .locate import Whereabouts  # here, for it imports diffusers, which takes seconds

        self._settings = settings
        self._tally = Tally()
        self._memory: dict[tuple, dict] = defaultdict(dict)
        self._plans: dict[tuple, Plan | None] = {}
        self._lengths: dict[int, tuple[Tensor, Tensor | str]] = {}
        self._warned: set[str] = set()
        self._undo: list = []
        self._observers: list[Observer] = []
        scheduler = getattr(model, "scheduler", None)
        self._clock = Whereabouts(lambda: getattr(scheduler, "timesteps", None), settings.steps, self._forget)
        self._grid: tuple[int, int, int] = (1, 1, 1)
        try:
            for name, transformer, family in _transformers(model):
                self._watch(name, transformer, family)
        except BaseException:
            self.disable()
            raise

    def disable(self) -> None:
        """Put everything back as it was; safe to call twice."""
        while self._undo:
            self._undo.pop()()
        self._forget()
        self._plans.clear()

    def report(self) -> Report:
        """What happened so far."""
        tally, method = self._tally, self._settings.method
        return Report(
            method=name_of(method),
            settings=method.settings(),
            executors=dict(tally.executors),
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
        from .locate import RootHook, watch

        def entered(arguments: dict) -> None:
            self._grid = family.grid(transformer.config, arguments)
            self._lengths.clear()

        self._undo.append(watch(transformer, RootHook(self._clock, entered)))
        sites = [(path, module) for path, module in transformer.named_modules() if re.fullmatch(family.sites, path)]
        for layer, (_, module) in enumerate(sites):
            attend = partial(self._attend, name, layer, len(sites), family.text, module)
            self._undo.append(divert(module, lambda attend=attend: attend))

    def _attend(
        self, component: str, layer: int, layers: int, text: str | None, module: nn.Module,
        sdpa: Attend, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """What a diverted attention call becomes: sparse where that is possible and pays, else the call it was."""
        pairs = query.shape[2] * key.shape[2] * query.shape[0] * query.shape[1]

        def dense(reason: str) -> Tensor:
            self._tally.stayed_dense(reason, pairs)
            with self._tally.attention.running(query.device):
                return sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

        grid = Grid(*self._grid).with_text(query.shape[2], text)
        if reason := self._obstacle(grid, query, key, dropout_p, is_causal, module):
            return dense(self._warn_once(reason))
        clock, block = self._clock, self._block(grid)
        site = Site(grid, block, layer, layers, clock.step, clock.steps, f"{component} {clock.branch}")
        if self._settings.schedule.dense(site):
            return dense("the schedule")
        if grid.tokens < self._min_tokens(query.device):
            return dense(f"fewer than {self._min_tokens(query.device)} tokens, where sparse does not pay")
        lengths = self._key_lengths(attn_mask, query)
        if isinstance(lengths, str):
            return dense(self._warn_once(lengths))
        with self._tally.attention.running(query.device):
            plan = self._plan(query, key, site)
        if plan is None:
            return dense("the method")
        plan = plan.padded(lengths)
        for observer in self._observers:
            observer(site, query, key, plan)
        self._tally.computed(grid, pairs, plan.share)
        with self._tally.attention.running(query.device):
            return self._sparse(plan, query, key, value, scale, site)

    def _sparse(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, scale: float | None, site: Site) -> Tensor:
        name, executor = pick(self._settings.executor, q, k, plan)
        self._tally.executors[name] += 1
        out, lse = executor.attend(q, k, v, plan, scale)
        return self._settings.method.correct(out, lse, site, self._memory[site.layer, site.branch, site.grid])

    def _plan(self, q: Tensor, k: Tensor, site: Site) -> Plan | None:
        method = self._settings.method
        place = (site.grid, q.device) if method.static else (site.grid, q.device, site.layer, site.branch)
        if place not in self._plans or (not method.static and self._settings.schedule.replan(site)):
            with self._tally.planning.running(q.device):
                self._plans[place] = method.plan(q, k, site, self._memory[site.layer, site.branch, site.grid])
        return self._plans[place]

    def _obstacle(
        self, grid: Grid | None, q: Tensor, k: Tensor, dropout: float, causal: bool, module: nn.Module
    ) -> str | None:
        """Why this call cannot be sparse, in words; None where it can."""
        if q.shape[2] != k.shape[2] or grid is None:
            frames, height, width = self._grid
            return f"{q.shape[2]} queries and {k.shape[2]} keys do not fit the grid {frames}x{height}x{width}"
        if causal or dropout:
            return "causal attention and dropout are not supported"
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
            return "gradients are asked for, and the executors have no backward pass"
        if getattr(module.processor, "_parallel_config", None) is not None:
            return "context parallelism is not supported"
        return None

    def _key_lengths(self, mask: Tensor | None, q: Tensor) -> Tensor | str | None:
        """Real keys of each batch item from a padding mask, ``[B]``; None: no padding; a string: why the mask cannot be
        read so. One look at each mask and transformer call, for on a GPU it waits for the device."""
        if mask is None:
            return None
        if id(mask) not in self._lengths:
            self._lengths[id(mask)] = (mask, _read_padding(mask, q.shape[0], q.shape[2]))
        return self._lengths[id(mask)][1]

    def _block(self, grid: Grid) -> int:
        return self._settings.block or (64 if grid.tokens < SMALL_SEQUENCE else 128)

    def _min_tokens(self, device: torch.device) -> int:
        given = self._settings.min_tokens
        return BREAK_EVEN.get(device.type, 4096) if given is None else given

    def _warn_once(self, reason: str) -> str:
        if reason not in self._warned:
            self._warned.add(reason)
            log.warning("attention stays dense: %s", reason)
        return reason

    def _forget(self) -> None:
        """A generation is over: what was learnt from its tokens goes; static plans know only the grid, and stay."""
        self._memory.clear()
        self._lengths.clear()
        if not self._settings.method.static:
            self._plans.clear()


def _transformers(model: Any) -> Iterator[tuple[str, nn.Module, Family]]:
    """Name, module and family of every transformer of a pipeline, or of the bare transformer itself.

    Raises:
        ValueError: there is none, or nobody knows its family.
    """
    parts = model.components if hasattr(model, "components") else {"transformer": model}
    found = [
        (name, part) for name, part in parts.items() if name.startswith("transformer") and isinstance(part, nn.Module)
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no transformer to make sparse")
    for _, part in found:
        if family_of(part) is None:
            raise ValueError(
                f"no family in dit_sparse/pipelines knows {type(part).__name__}; use dit_sparse.attention, "
                "or add a family (CONTRIBUTING: add a model)"
            )
    return ((name, part, family_of(part)) for name, part in found)


def _resolve(method: str | Method, density: float | None, settings: dict) -> Method:
    if isinstance(method, str):
        density = DEFAULT_DENSITY if density is None and not settings else density
        return method_named(method, **({} if density is None else {"density": density}), **settings)
    if not isinstance(method, Method):
        raise ValueError(f"a method is a name or a dit_sparse.Method, not {type(method).__name__}")
    if settings:
        raise ValueError(f"settings such as {next(iter(settings))!r} go with a method's name; a Method has its own")
    return method if density is None else replace(method, density=density)


def _read_padding(mask: Tensor, batch: int, tokens: int) -> Tensor | str:
    if mask.dtype != torch.bool:
        return "the attention mask is additive, not a boolean padding mask"
    if mask.shape[-1] != tokens or mask.numel() not in (tokens, batch * tokens):
        return f"the attention mask {list(mask.shape)} is no padding mask over {tokens} keys"
    mask = mask.reshape(-1, tokens)
    lengths = mask.sum(-1)
    if not (mask == (torch.arange(tokens, device=mask.device) < lengths[:, None])).all():
        return "the attention mask leaves out tokens in the middle of the sequence"
    return lengths.expand(batch)
