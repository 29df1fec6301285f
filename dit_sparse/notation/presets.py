"""Presets: names for a method at a density, and the dense steps and layers that papers give for model families."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

RADIAL = "Radial Attention, arXiv:2506.19852"
SVG2 = "Sparse VideoGen2, arXiv:2505.18875"
ADASPA = "AdaSpa, arXiv:2502.21079"


@dataclass(frozen=True)
class FamilySchedule:
    """Which steps and layers stay dense in models of a family.

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
        families: schedules by family of transformers (``dit_sparse/pipelines``); the default one for other families.
    """

    method: str
    summary: str
    families: dict[str, FamilySchedule]


# A quarter of the steps, the default, is what Radial Attention keeps dense (12 of 50). 3 % of the layers is the first
# one of 40 and none of fewer than 34.
_FIRST_LAYER = FamilySchedule({"dense_layers": 0.03}, f"{RADIAL}; {SVG2}")
_FEWER_STEPS = {
    "wan": _FIRST_LAYER,
    "hunyuan_video": FamilySchedule({"dense_steps": 0.1, "dense_layers": 0.03}, SVG2),
    "cogvideox": FamilySchedule({"dense_steps": 0.2}, ADASPA),
    "cosmos": FamilySchedule({"dense_steps": 0.3}, SVG2),
}
_MORE_STEPS = {name: _FEWER_STEPS[name] for name in ("wan", "cosmos")}

PRESETS = {
    "quality": Preset("routed(density=0.25)", "highest fidelity to the dense video", _MORE_STEPS),
    "balanced": Preset("routed(density=0.15)", "less attention, still well above dense with fewer steps", _FEWER_STEPS),
    "fast": Preset("asa(density=0.25)", "the cheapest plans and no residual", _FEWER_STEPS),
}
DEFAULT_PRESET = "balanced"


def family_schedule(preset: str, families: Collection[str]) -> FamilySchedule | None:
    """Return the schedule of a preset for the transformers of a pipeline.

    Args:
        preset: a name in ``PRESETS``.
        families: the families of all transformers of the pipeline.

    Returns:
        None if the preset has no schedule for the family, or if the transformers belong to several families.
    """
    return PRESETS[preset].families.get(next(iter(families))) if len(set(families)) == 1 else None
