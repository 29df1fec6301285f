"""Summary of a row's clips: fidelity to the dense video, cost, and confidence intervals."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import stats

from dit_sparse.eval.quality.fidelity import Unavailable, summary_statistics
from dit_sparse.eval.quality.measures import FAST, MEASURES
from dit_sparse.eval.quality.vbench_style import quality
from dit_sparse.generation.generate import default_fps
from dit_sparse.methods import kind_of
from dit_sparse.output.environment import is_busy

from .clip_spec import ClipSpec
from .runner import ClipRunner

DENSITY_TOLERANCE = 0.01  # densities that differ by more are not the same
STRIP_FRAMES, STRIP_HEIGHT = 4, 160


def summarize_row(
    spec: ClipSpec, runner: ClipRunner, with_quality: bool = False, measures: Sequence[str] = FAST
) -> dict:
    """Return one row for JSON from the stored clips of a row and of dense attention.

    Args:
        spec: the row; all its clips must be stored.
        runner: the runner that generated them.
        with_quality: also score each clip by `quality`.
        measures: keys of `MEASURES` to compute.
    """
    runs, dense_runs, scores = [], [], []
    values: dict[str, list[float | str]] = {name: [] for name in measures}
    strip, fps = None, default_fps(runner.model)
    for clip, dense in runner.clip_pairs(spec):
        runs.append(clip.metadata)
        dense_runs.append(dense.metadata)
        strip = strip or _film_strip(clip.frames)
        for name in () if spec.is_reference else measures:
            values[name].append(_value_or_reason(name, clip.frames, dense.frames, fps))
        if with_quality:
            scores.append(quality(clip.frames, clip.metadata["prompt"], fps))
    row = {
        "name": spec.name,
        "given": spec.requested_as,
        "method": spec.method,
        "kind": kind_of(spec.method),
        "steps": runs[0]["steps"],
        "settings": runs[0]["settings"],
        "resolved": runs[0].get("resolved", {}),
        "density_note": runs[0].get("density_note"),
    }
    row |= _densities(spec, runs, dense_runs)
    for name, measure in MEASURES.items():
        row[name] = _statistics(values.get(name, ()), runner.seeds, measure.larger_is_better)
    if spec.equal_to:
        row["equal_to"] = list(spec.equal_to)
    row |= {"over_random": None, "latent_error": _latent_error(runs), "quality": _mean_quality(scores)}
    row |= _cost(runs, dense_runs)
    row |= {"commits": sorted({run["commit"] for run in runs if run.get("commit")})}
    return row | {"executors": runs[0]["executors"], "grids": runs[0]["grids"], "strip": strip}


def _densities(spec: ClipSpec, runs: Sequence[dict], dense_runs: Sequence[dict]) -> dict:
    achieved = [run["density_achieved"] for run in runs if run["density_achieved"] is not None]
    mean = fmean(achieved) if achieved else None
    mass = [run["mass"] for run in runs if run["mass"]]
    tables = np.mean(mass, 0).tolist() if mass else None
    # A run with fewer steps computes fewer pairs than the dense run.
    of_dense = [run["density_run"] * run["steps"] / dense["steps"] for run, dense in zip(runs, dense_runs, strict=True)]
    return {
        "density_asked": spec.density,
        "density_achieved": mean,
        "density_hit": None if None in (mean, spec.density) else is_same_density(mean, spec.density),
        "density_run": fmean(of_dense),
        "tail_density": fmean(run.get("tail_density") or 0.0 for run in runs),
        "retained": float(np.mean(tables)) if tables else None,
        "mass": tables,
    }


def _cost(runs: Sequence[dict], dense_runs: Sequence[dict]) -> dict:
    total = lambda key, of=runs: sum(run[key] for run in of)
    seconds, attention_seconds = total("seconds"), total("attention_seconds")
    return {
        "seconds": seconds,
        "attention_seconds": attention_seconds,
        "speedup": total("seconds", dense_runs) / seconds,
        "attention_speedup": total("attention_seconds", dense_runs) / max(attention_seconds, 1e-9),
        "planning_share": total("planning_seconds") / max(attention_seconds, 1e-9),
        "busy_clips": sum(is_busy(run.get("load")) for run in runs),
    }


def _value_or_reason(name: str, frames: NDArray, dense: NDArray, fps: float) -> float | str:
    """Return the value of a measure, or the reason why it is unavailable."""
    try:
        return MEASURES[name].score(frames, dense, fps)[0]
    except Unavailable as error:
        return str(error)


def _statistics(values: Sequence[float | str], seeds: int, larger_is_better: bool) -> dict | None:
    """Return mean, median, worst decile and values of the clips, and an interval for the mean over prompts; None if
    there are no values."""
    if not values:
        return None
    if reason := next((value for value in values if isinstance(value, str)), None):
        return {"unavailable": reason}
    statistics = {name: _finite(value) for name, value in summary_statistics(values, larger_is_better).items()}
    return statistics | {
        "interval": confidence_interval(_by_prompt(values, seeds)),
        "each": [_finite(value) for value in values],
    }


def is_same_density(density: float, other: float) -> bool:
    return abs(density - other) <= DENSITY_TOLERANCE + 1e-9


def row_density(row: dict) -> float | None:
    """Return a row's requested density, or the achieved one if its own settings decide; None for dense attention."""
    return row["density_achieved"] if row["density_asked"] is None else row["density_asked"]


def gain_over_random(row: dict, rows: Sequence[dict], seeds: int) -> dict | None:
    """Return the PSNR of a row minus that of random blocks of the same density, in dB, paired by prompt.

    Returns:
        ``mean`` and ``interval``, or None if ``rows`` has no random blocks of this density, or a PSNR is infinite.
    """
    density = row_density(row)
    if density is None or row["psnr"] is None:
        return None
    baselines = [one for one in rows if one["method"] == "random_blocks" and row_density(one) is not None]
    baseline = min(baselines, key=lambda one: abs(row_density(one) - density), default=None)
    if baseline is None or not is_same_density(row_density(baseline), density):
        return None
    values, baseline_values = row["psnr"]["each"], baseline["psnr"]["each"]
    if None in values + baseline_values:
        return None
    gains = _by_prompt(values, seeds) - _by_prompt(baseline_values, seeds)
    return {"mean": float(gains.mean()), "interval": confidence_interval(gains)}


def confidence_interval(values: Sequence[float] | NDArray) -> list[float] | None:
    """Return the 95 % bootstrap interval ``[low, high]`` of the mean over prompts, the same for the same values.

    Args:
        values: one per prompt. For a paired comparison of two rows, the differences by prompt.

    Returns:
        None for fewer than two prompts or an infinite value.
    """
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    generator = np.random.default_rng(0)
    result = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=generator)
    return [float(bound) for bound in result.confidence_interval]


def _by_prompt(values: Sequence[float], seeds: int) -> NDArray:
    """Return the mean over the seeds of each prompt; ``values`` hold all seeds of a prompt consecutively."""
    return np.reshape(values, (-1, seeds)).mean(1)


def _finite(value: float) -> float | None:
    """Return None for infinity, which JSON does not have; the PSNR of equal videos is infinite."""
    return value if np.isfinite(value) else None


def _mean_quality(scores: Sequence[dict]) -> dict | None:
    """Return the mean of every dimension over the clips; an unavailable dimension keeps its reason."""
    if not scores:
        return None
    return {
        name: fmean(score[name] for score in scores) if isinstance(value, float) else value
        for name, value in scores[0].items()
    }


def _latent_error(runs: Sequence[dict]) -> list | None:
    """Return the relative error of the latents as ``[[step, error], ...]``, the mean over the clips."""
    curves = [run["latent_error"] for run in runs if run["latent_error"]]
    return [[int(step), error] for step, error in np.mean(curves, 0).tolist()] if curves else None


def _film_strip(frames: NDArray) -> str:
    """Return a few frames side by side as a WebP image in base64."""
    chosen = frames[np.linspace(0, len(frames) - 1, min(STRIP_FRAMES, len(frames))).round().astype(int)]
    image = Image.fromarray(np.concatenate(list(chosen), 1))
    image.thumbnail((image.width, STRIP_HEIGHT))
    file = BytesIO()
    image.save(file, "WEBP", quality=80)
    return base64.b64encode(file.getvalue()).decode()
