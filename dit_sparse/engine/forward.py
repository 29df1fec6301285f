"""Where an attention call belongs: its module, and the transformer call it is part of."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from ..grid import Grid, Site
from ..pipelines.family import GridShape
from .settings import Settings
from .tracking import StepTracker


@dataclass(frozen=True)
class AttentionSite:
    """A self-attention module of a transformer.

    Attributes:
        component: name of the transformer in its pipeline.
        layer, layers: number of the module, and how many there are.
        text: position of the text tokens, as in ``Family``.
        module: the attention module.
    """

    component: str
    layer: int
    layers: int
    text: str | None
    module: nn.Module


class Forward:
    """The running transformer call.

    Args:
        settings: settings of the run.
        tracker: knows the step and branch.

    Attributes:
        shape: frames, height and width of the video tokens.
    """

    def __init__(self, settings: Settings, tracker: StepTracker) -> None:
        self._settings, self._tracker = settings, tracker
        self.shape: GridShape = (1, 1, 1)
        self._batch = 1
        self._calls: Counter[nn.Module] = Counter()  # Mochi calls each module once per batch item

    def begin(self, shape: GridShape, batch: int) -> None:
        """Record the token grid and batch size of a transformer call that begins."""
        self.shape, self._batch = shape, batch
        self._calls.clear()

    def count_call(self, attention_site: AttentionSite) -> None:
        """Count a call of a module, so that its next call is about the next batch item."""
        self._calls[attention_site.module] += 1

    def site(self, attention_site: AttentionSite, grid: Grid) -> Site:
        """Return the site of the next call of a module."""
        tracker, component = self._tracker, attention_site.component
        call = self._calls[attention_site.module]
        prompts = self._batch // (1 + tracker.both_branches) or 1
        return Site(
            grid,
            block=self._settings.block_for(grid),
            layer=attention_site.layer,
            layers=attention_site.layers,
            step=tracker.step,
            steps=tracker.steps,
            branch=f"{component} {tracker.branch} {call}",
            plan_group=f"{component} {tracker.plan_group} {call % prompts}",
            both_branches=tracker.both_branches,
        )
