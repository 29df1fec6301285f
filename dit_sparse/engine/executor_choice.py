"""The executor of every attention call of a run, chosen at the first call of each signature."""

from __future__ import annotations

from torch import Tensor

from ..clusters import ClusterPlan
from ..grid import Grid, Site
from ..kernels.pick import Choice, pick
from ..plan import Plan
from .report import RunCounters
from .settings import Settings


class ExecutorChoices:
    """Executors by call signature. A choice is cached because making one synchronizes with the GPU.

    Args:
        settings: settings of the run.
        counters: count how often ``"auto"`` makes each choice.
    """

    def __init__(self, settings: Settings, counters: RunCounters) -> None:
        self._settings, self._counters = settings, counters
        self._sparse: dict[tuple, Choice] = {}
        self._dense: dict[tuple, tuple[Choice, Plan]] = {}
        self._dense_layers: set[tuple] = set()  # grids and layers for which dense attention is fastest

    def for_plan(self, plan: Plan | ClusterPlan, q: Tensor, k: Tensor, site: Site) -> Choice:
        """Return the executor of a sparse call, or the choice named ``"dense"`` if dense attention is fastest."""
        settings = self._settings
        signature = (site.grid, site.layer, q.shape, q.dtype, q.device, type(plan), plan.lengths is None)
        if signature not in self._sparse:
            may_be_dense, needs_lse = settings.min_tokens is None, settings.method.needs_lse
            choice = pick(settings.executor, q, k, plan, or_dense=may_be_dense, lse=needs_lse)
            self._sparse[signature] = choice
            if settings.executor == "auto":
                self._count(choice)
            if choice.name == "dense":
                self._dense_layers.add((site.grid, site.layer))
        return self._sparse[signature]

    def dense_reason(self, site: Site) -> str | None:
        """Return why a layer needs no plan: dense attention was fastest at its first sparse call."""
        return "dense attention is faster, as measured" if (site.grid, site.layer) in self._dense_layers else None

    def may_replace_sdpa(self, grid: Grid) -> bool:
        """Whether an executor may compute dense steps: with ``"auto"``, except for the method `Dense` and short
        sequences."""
        settings = self._settings
        named = settings.executor != "auto"
        return not (named or settings.method.keeps_model_attention or settings.min_tokens_reason(grid))

    def fastest_for_dense(
        self, q: Tensor, k: Tensor, lengths: Tensor | None, site: Site
    ) -> tuple[Choice, Plan] | tuple[None, None]:
        """Return the fastest executor for a dense step and a full plan, or ``(None, None)`` if SDPA is fastest."""
        signature = (site.grid, q.shape, q.dtype, q.device, lengths is None)
        if signature not in self._dense:
            full_plan = Plan.dense(site.grid.tokens, site.block, q.device)
            choice = pick("auto", q, k, full_plan.with_lengths(lengths), or_dense=True)
            self._count(choice)
            self._dense[signature] = choice, full_plan
        choice, full_plan = self._dense[signature]
        return (None, None) if choice.name == "dense" else (choice, full_plan.with_lengths(lengths))

    def end_generation(self) -> None:
        """Drop the choices that depend on a clip's density, so that results do not depend on the order of clips."""
        if self._settings.density_varies:
            self._sparse.clear()
            self._dense_layers.clear()

    def _count(self, choice: Choice) -> None:
        self._counters.choices[f"{choice.name}: {choice.reason}"] += 1
