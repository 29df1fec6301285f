"""A pipeline with sparse attention: the object that `enable` returns."""

from __future__ import annotations

import html
import re
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..composition import nested_methods
from ..methods import name_of
from ..pipelines.module_adapter import AnyFamily, ModuleAdapter
from .dispatcher import AttentionDispatcher, Observer
from .forward import AttentionCall, AttentionSite
from .interception.forward_hook import ForwardHook, ModuleHook
from .interception.intercept import Interception, interception_of
from .interception.module_link import ModuleLink, link_of
from .interception.parallel import check_parallelism
from .report import Report, RunCounters
from .settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Run:
    """A pipeline or transformer with sparse attention, until :meth:`disable` or the end of a ``with`` block.

    Plans and the memory of methods belong to the run. They are dropped when a generation ends, fails or restarts.

    Args:
        model: class name of the pipeline or transformer.
        settings: validated settings.
        scheduler: returns the pipeline's scheduler, or None.
        guided: returns whether a pipeline that batches the branches of guidance computes both now.
        transformers: name, wrapper, module and family of each transformer.

    A run may serve several threads: each has its own step, plans and memory.
    """

    def __init__(
        self,
        model: str,
        settings: Settings,
        scheduler: Callable[[], Any],
        guided: Callable[[], bool],
        transformers: Iterable[tuple[str, nn.Module, nn.Module, AnyFamily]],
    ) -> None:
        self._model, self._settings = model, settings
        self._counters = RunCounters()
        self._observers: list[Observer] = []
        self._new_dispatcher = partial(
            AttentionDispatcher, settings, self._counters, self._observers, scheduler, guided
        )
        self._threads = threading.local()
        self._hooks: list[ForwardHook] = []
        self._links: list[tuple[nn.Module, Interception | ModuleLink]] = []
        self._default_steps: dict[str, int | None] = {}  # of plain modules, by component
        self._intercepted: set[str] = set()  # components of which an attention call was intercepted
        try:
            for name, wrapper, transformer, family in transformers:
                self._attach(name, wrapper, transformer, family)
        except BaseException:
            self.disable()
            raise

    @property
    def _dispatcher(self) -> AttentionDispatcher:
        """The dispatcher of this thread that was used last."""
        return getattr(self._threads, "last", None) or self._dispatcher_of("")

    def _dispatcher_of(self, component: str) -> AttentionDispatcher:
        """Return the dispatcher of a component in this thread. The transformers of a diffusers pipeline share one,
        because they compute the steps of one generation; a plain module has steps of its own."""
        key = component if component in self._default_steps else ""
        dispatchers = self._threads.__dict__.setdefault("dispatchers", {})
        if key not in dispatchers:
            dispatchers[key] = self._new_dispatcher(default_steps=self._default_steps.get(key))
        self._threads.last = dispatchers[key]
        return dispatchers[key]

    @property
    def active(self) -> bool:
        """Whether the model is sparse now."""
        return bool(self._hooks)

    def disable(self) -> None:
        """Restore the model bit for bit. Calling it again has no effect."""
        for hook in self._hooks:
            hook.remove()
        for module, link in self._links:
            link.remove(module)
        self._hooks, self._links = [], []
        # Runs may be kept for their report: release the model, and the plans of all threads.
        self._threads = threading.local()
        self._new_dispatcher = partial(
            AttentionDispatcher, self._settings, self._counters, [], lambda: None, lambda: False
        )

    def report(self) -> Report:
        """Return what the run has computed so far."""
        return self._counters.report(self._settings)

    def observe(self, observer: Observer) -> None:
        """Call ``observer(site, q, k, plan)`` before every sparse call, outside of the measured time."""
        self._observers.append(observer)

    def plot(self) -> Figure:
        """Plot the plan of the most recent sparse call.

        Raises:
            RuntimeError: no sparse call was made yet, or the run is disabled.
        """
        if self._dispatcher.last_plan is None:
            reason = "no sparse call was made yet" if self.active else "the run is disabled"
            raise RuntimeError(f"there is no plan to plot: {reason}; generate a video while the run is active")
        from ..plotting.masks import plot_plan

        site, plan = self._dispatcher.last_plan
        title = f"{name_of(self._settings.method)}, layer {site.layer}, step {site.step}"
        return plot_plan(plan, site.grid, title)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.disable()

    def __repr__(self) -> str:
        tracker = self._dispatcher.tracker
        step = f", step {tracker.step}" + (f"/{tracker.steps}" if tracker.steps else "") if tracker.generating else ""
        return f"Run({self._model}, {self._settings}{step}, {'active' if self.active else 'disabled'})"

    def _repr_html_(self) -> str:
        """Show the report and the plot in a notebook."""
        text = f"<pre>{html.escape(repr(self))}\n{html.escape(str(self.report()))}</pre>"
        if self._dispatcher.last_plan is None:
            return text
        from ..plotting.style import figure_to_html

        return text + figure_to_html(self.plot())

    def __reduce__(self):
        return type(None), ()  # a copy or a pickle of the model is unmodified, and has no run

    def _attach(self, name: str, wrapper: nn.Module, transformer: nn.Module, family: AnyFamily) -> None:
        """Observe a transformer and intercept its self-attention modules."""
        modules = [module for path, module in transformer.named_modules() if re.fullmatch(family.sites, path)]
        if not modules:
            raise ValueError(f"{type(transformer).__name__} has no self-attention module that matches {family.sites!r}")
        if any(interception_of(module) or link_of(module) for module in modules):
            raise ValueError("this transformer is already sparse: call disable() on the earlier run first")
        check_parallelism(transformer, modules)
        heads = getattr(modules[0], "heads", getattr(modules[0], "num_heads", 0))
        self._settings.method.check_model(len(modules), heads)
        for method in nested_methods(self._settings.method):
            method.check_transformer(tuple(cls.__name__ for cls in type(transformer).__mro__))
        links = []
        for layer, module in enumerate(modules):
            site = AttentionSite(name, layer, len(modules), family.text, module, family.cached_keys, family.packed_text)
            links.append((module, self._new_link(site, family)))

        def begin_forward(*arguments: Any) -> None:
            check_parallelism(transformer, modules)
            for module, link in links:
                link.install(module)  # other code may have replaced the processor, as fuse_qkv_projections does
            self._dispatcher_of(name).begin_forward(*arguments)

        self._links += links
        for module, link in links:
            link.install(module)
        hook, end = ForwardHook, partial(self._end_forward, name)
        if isinstance(family, ModuleAdapter):
            hook, end = ModuleHook, partial(self._end_module_forward, name, transformer, family)
            self._default_steps[name] = family.steps
        self._hooks.append(hook(wrapper, transformer, family, begin_forward, end, partial(self._reset, name)))

    def _new_link(self, site: AttentionSite, family: AnyFamily) -> Interception | ModuleLink:
        attend = partial(self._attend, site)
        if isinstance(family, ModuleAdapter) and not hasattr(site.module, "processor"):
            return ModuleLink(attend, self._count_missed, family.call, family.heads_first)
        return Interception(attend, self._count_missed, family.mask)

    def _attend(self, site: AttentionSite, call: AttentionCall) -> Tensor:
        self._intercepted.add(site.component)
        return self._dispatcher_of(site.component).attend(site, call)

    def _end_forward(self, name: str) -> None:
        self._dispatcher_of(name).tracker.end_forward()

    def _end_module_forward(self, name: str, module: nn.Module, adapter: ModuleAdapter) -> None:
        """Raise RuntimeError after the first forward call of a plain module if no attention call was intercepted."""
        self._end_forward(name)
        if name not in self._intercepted:
            raise RuntimeError(
                f"no self-attention call of {type(module).__name__} was intercepted: the modules {adapter.sites!r} do "
                f"not call {adapter.call or 'scaled_dot_product_attention'}; set the model to PyTorch's attention, or "
                "pass the name of its attention function as call="
            )

    def _reset(self, name: str) -> None:
        self._dispatcher_of(name).tracker.reset()

    def _count_missed(self, reason: str) -> None:
        """Count a call of an attention processor that the run cannot compute."""
        self._counters.count_dense(self._counters.warn(reason), None)
