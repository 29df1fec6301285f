"""Presets: names for a method at a density, and the dense steps and layers that papers give for models."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

RADIAL = "Radial Attention, arXiv:2506.19852"
SVG2 = "Sparse VideoGen2, arXiv:2505.18875"
ADASPA = "AdaSpa, arXiv:2502.21079"


@dataclass(frozen=True)
class PaperSchedule:
    """Which steps and layers stay dense in a model.

    Attributes:
        schedule: fields of a `Schedule` that differ from its defaults.
        source: the paper that gives them, or whose authors' scripts do.
    """

    schedule: dict[str, int | float]
    source: str


@dataclass(frozen=True)
class Preset:
    """A method at a density, chosen from the comparisons in docs/benchmarks.md and docs/routed.md.

    Attributes:
        method: its text.
        summary: what it costs and gives.
        schedules: by class name of the transformer; the default schedule for other classes.
    """

    method: str
    summary: str
    schedules: dict[str, PaperSchedule]


# A quarter of the steps, the default, is what Radial Attention keeps dense (12 of 50). 3 % of the layers is the first
# one of 40 and none of fewer than 34.
_FIRST_LAYER = PaperSchedule({"dense_layers": 0.03}, f"{RADIAL}; {SVG2}")
_FEWER_STEPS = {
    "WanTransformer3DModel": _FIRST_LAYER,
    "HunyuanVideoTransformer3DModel": PaperSchedule({"dense_steps": 0.1, "dense_layers": 0.03}, SVG2),
    "CogVideoXTransformer3DModel": PaperSchedule({"dense_steps": 0.2}, ADASPA),
    "CosmosTransformer3DModel": PaperSchedule({"dense_steps": 0.3}, SVG2),
}
_MORE_STEPS = {name: _FEWER_STEPS[name] for name in ("WanTransformer3DModel", "CosmosTransformer3DModel")}

PRESETS = {
    "quality": Preset("routed(density=0.25)", "highest fidelity to the dense video", _MORE_STEPS),
    "balanced": Preset("routed(density=0.15)", "less attention, still well above dense with fewer steps", _FEWER_STEPS),
    "fast": Preset("asa(density=0.25)", "least time for plans: the highest speedup, at lower fidelity", _FEWER_STEPS),
}
DEFAULT_PRESET = "balanced"


def paper_schedule(preset: str, transformers: Collection[str]) -> PaperSchedule | None:
    """Return the schedule of a preset for a pipeline.

    Args:
        preset: a name in ``PRESETS``.
        transformers: the class names of the transformers of the pipeline.

    Returns:
        None if the preset has no schedule for the class, or if the transformers are of several classes.
    """
    names = set(transformers)
    return PRESETS[preset].schedules.get(names.pop()) if len(names) == 1 else None
