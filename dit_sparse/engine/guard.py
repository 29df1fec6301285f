"""Quality guard: layers whose plans retain too little attention mass compute more pairs, or all."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from ..clusters import ClusterPlan
from ..grid import Site
from ..plan import Plan
from ..scoring import without_padding
from .forward import AttentionCall
from .report import RunCounters

INTERVAL = 3  # steps between two measurements; odd, so that new and older plans are measured alternately
DENSE_LEVEL = 3  # the number of dropped pairs is halved twice before a layer becomes dense
TOKENS_PER_ROW = 512  # so that the sampled rows are less than 1 % of the pairs at a density of .25
MAX_ROWS = 32


class QualityGuard:
    """Measures the attention mass that plans retain on a few queries, and raises the density of layers below a limit.

    A layer below the limit drops half as many pairs from the next step on; the third time it is dense until the
    generation ends. Methods without a density become dense at once.

    Args:
        least: attention mass that the plans of a layer must retain, a mean over queries and heads; None: no limit.
        has_density: whether the method has a density.
        counters: receive what was measured.
    """

    def __init__(self, least: float | None, has_density: bool, counters: RunCounters) -> None:
        self._least, self._has_density, self._counters = least, has_density, counters
        self._levels: dict[tuple, int] = {}
        self._measured: dict[tuple, list[Tensor]] = defaultdict(list)
        self._last_step: dict[tuple, int] = {}

    def level(self, site: Site) -> int:
        """Return how many times the density of a layer was raised."""
        return self._levels.get((site.component, site.layer), 0)

    def density(self, site: Site, density: float) -> float:
        """Return the raised density of a layer."""
        return 1 - (1 - density) / 2 ** self.level(site) if self.level(site) else density

    def dense_reason(self, site: Site) -> str | None:
        """Return why a layer is dense, or None if it is not."""
        return "the guard" if self.level(site) >= DENSE_LEVEL else None

    def begin_forward(self) -> None:
        """Raise the densities of layers that the last forward call measured below the limit. Synchronizes with the GPU
        once."""
        if not self._measured:
            return
        layers = list(self._measured)
        least = torch.stack([torch.stack(masses).amin() for masses in self._measured.values()]).tolist()
        self._measured.clear()
        for layer, mass in zip(layers, least, strict=True):
            if mass < self._least:
                step = 1 if self._has_density else DENSE_LEVEL
                self._levels[layer] = min(self._levels.get(layer, 0) + step, DENSE_LEVEL)
            self._counters.count_guard(*layer, mass, self._levels.get(layer, 0))

    def end_generation(self) -> None:
        """Reset the levels, so that results do not depend on the order of clips."""
        self._levels.clear()
        self._measured.clear()
        self._last_step.clear()

    def measure(self, call: AttentionCall, site: Site, plan: Plan | ClusterPlan) -> None:
        """Measure the mass that a plan retains of a sparse call, at some steps."""
        layer = site.component, site.layer
        step = self._last_step.get((layer, site.branch))
        if self._least is None or (step is not None and 0 <= site.step - step < INTERVAL):
            return
        self._last_step[layer, site.branch] = site.step
        with self._counters.attention.timing(call.q.device):
            self._measured[layer].append(retained_mass(call, site, plan))


def retained_mass(call: AttentionCall, site: Site, plan: Plan | ClusterPlan) -> Tensor:
    """Return the share of the attention weights that a plan computes, a mean over sampled video queries and heads."""
    q, k, grid = call.q, call.k, site.grid
    first = max(grid.before, site.first_query)
    video = grid.before + grid.video - first
    count = min(max(video // TOKENS_PER_ROW, 1), MAX_ROWS)
    rows = first + ((torch.arange(count, device=q.device) + 0.5) * (video / count)).long()
    k = k if plan.lengths is None else without_padding(k, plan.lengths)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    logits = (q[:, :, rows] @ k.mT).float() * scale
    if plan.lengths is not None:
        padding = torch.arange(grid.tokens, device=q.device) >= plan.lengths[:, None]
        logits = logits.masked_fill(padding[:, None, None], -torch.inf)
    return (logits.softmax(-1) * plan.token_mask(rows)).sum(-1).mean()
