"""A pipeline with sparse attention: the object that `enable` returns."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from ..methods import name_of
from ..pipelines.family import Family
from .dispatcher import AttentionDispatcher, Observer
from .forward import AttentionSite
from .intercept import intercept_attention
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
        timesteps: returns the timesteps of the pipeline's scheduler, or None.
        guided: returns whether a pipeline that batches the branches of guidance computes both.
        transformers: name, module and family of each transformer.
    """

    def __init__(
        self,
        model: str,
        settings: Settings,
        timesteps: Callable[[], Any],
        guided: Callable[[], bool],
        transformers: Iterable[tuple[str, nn.Module, Family]],
    ) -> None:
        from .tracking import StepTracker  # imports diffusers, which takes seconds

        self._model, self._settings = model, settings
        self._counters = RunCounters()
        self._tracker = StepTracker(timesteps, guided, settings.steps, lambda: self._dispatcher.end_generation())
        self._dispatcher = AttentionDispatcher(settings, self._tracker, self._counters)
        self._undo: list[Callable[[], None]] = []
        try:
            for name, transformer, family in transformers:
                self._attach(name, transformer, family)
        except BaseException:
            self.disable()
            raise

    @property
    def active(self) -> bool:
        """Whether the model is sparse now."""
        return bool(self._undo)

    def disable(self) -> None:
        """Restore the model bit for bit. Calling it again has no effect."""
        while self._undo:
            self._undo.pop()()
        self._dispatcher.end_generation()
        self._dispatcher.last_plan = None

    def report(self) -> Report:
        """Return what the run has computed so far."""
        return self._counters.report(self._settings.method)

    def observe(self, observer: Observer) -> None:
        """Call ``observer(site, q, k, plan)`` before every sparse call, outside of the measured time."""
        self._dispatcher.observers.append(observer)

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
        tracker = self._tracker
        step = f", step {tracker.step}" + (f"/{tracker.steps}" if tracker.steps else "") if tracker.generating else ""
        return f"Run({self._model}, {self._settings}{step}, {'active' if self.active else 'disabled'})"

    def _repr_html_(self) -> str:
        """Show the report and the plot in a notebook."""
        text = f"<pre>{html.escape(repr(self))}\n{html.escape(str(self.report()))}</pre>"
        if self._dispatcher.last_plan is None:
            return text
        from ..plotting.style import figure_to_html

        return text + figure_to_html(self.plot())

    def _attach(self, name: str, transformer: nn.Module, family: Family) -> None:
        """Hook a transformer and intercept its self-attention modules."""
        from .tracking import RootHook, register_root_hook

        def on_forward(arguments: dict) -> None:
            shape = family.grid(transformer.config, arguments)
            self._dispatcher.begin_forward(shape, batch=len(arguments["hidden_states"]))

        self._undo.append(register_root_hook(transformer, RootHook(self._tracker, on_forward)))
        modules = [module for path, module in transformer.named_modules() if re.fullmatch(family.sites, path)]
        self._settings.method.check_model(len(modules), getattr(modules[0], "heads", 0) if modules else 0)
        for layer, module in enumerate(modules):
            attention_site = AttentionSite(name, layer, len(modules), family.text, module)
            self._undo.append(intercept_attention(module, partial(self._dispatcher.attend_for, attention_site)))
