"""What the clips of a row say: how near to dense, at what cost, and how sure that is."""

from __future__ import annotations

import base64
from collections.abc import Callable
from io import BytesIO
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dit_sparse.eval.quality.fidelity import Unavailable, lpips, ms_ssim, psnr, spread, ssim
from dit_sparse.eval.quality.vbench_style import quality
from dit_sparse.generation.generate import usual_fps

from .bootstrap import interval
from .runner import ClipRunner, ClipSpec

NEAR = 0.01  # a density further off than this from what was asked for is marked
METRICS = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim, "lpips": lpips}
STRIP_FRAMES, STRIP_HEIGHT = 4, 160


def summary(wanted: ClipSpec, studio: ClipRunner, with_quality: bool = False) -> dict:
    """One row for JSON, from the takes of it and of dense attention."""
    notes, references, judged, measured = [], [], [], {name: [] for name in METRICS}
    strip = None
    for take, dense in studio.takes(wanted):
        notes.append(take.note)
        references.append(dense.note)
        strip = strip or _strip(take.frames)
        for name, metric in METRICS.items():
            measured[name].append(_taken(metric, take.frames, dense.frames))
        if with_quality:
            judged.append(quality(take.frames, take.note["prompt"], usual_fps(studio.model)))
    is_dense = wanted.method == "dense" and wanted.steps is None
    total = lambda key, of=notes: sum(note[key] for note in of)
    row = {
        "name": wanted.name,
        "given": wanted.given,
        "method": wanted.method,
        "steps": notes[0]["steps"],
        "settings": notes[0]["settings"],
    }
    row |= _densities(wanted, notes, references)
    for name, values in measured.items():
        row[name] = None if is_dense else _spread(values, studio.seeds, larger_is_better=name != "lpips")
    if wanted.equal_to:
        row["equal_to"] = list(wanted.equal_to)
    row |= {"over_random": None, "latent_error": _latent_error(notes), "quality": _means(judged)}
    row |= {"seconds": total("seconds"), "attention_seconds": total("attention_seconds")}
    row["speedup"] = total("seconds", references) / row["seconds"]
    row["attention_speedup"] = total("attention_seconds", references) / max(row["attention_seconds"], 1e-9)
    row["planning_share"] = total("planning_seconds") / max(row["attention_seconds"], 1e-9)
    return row | {"executors": notes[0]["executors"], "grids": notes[0]["grids"], "strip": strip}


def _densities(wanted: ClipSpec, notes: list[dict], references: list[dict]) -> dict:
    achieved = [note["density_achieved"] for note in notes if note["density_achieved"] is not None]
    mean = fmean(achieved) if achieved else None
    mass = [note["mass"] for note in notes if note["mass"]]
    tables = np.mean(mass, 0).tolist() if mass else None
    of_dense = [n["density_run"] * n["steps"] / dense["steps"] for n, dense in zip(notes, references, strict=True)]
    return {
        "density_asked": wanted.density,
        "density_achieved": mean,
        "density_hit": None if None in (mean, wanted.density) else near(mean, wanted.density),
        "density_run": fmean(of_dense),  # fewer steps are fewer pairs, too
        "retained": float(np.mean(tables)) if tables else None,
        "mass": tables,
    }


def _taken(metric: Callable, frames: NDArray, dense: NDArray) -> float | str:
    """What a metric says, or why it cannot."""
    try:
        return metric(frames, dense)
    except Unavailable as why:
        return str(why)


def _spread(values: list[float | str], seeds: int, larger_is_better: bool) -> dict:
    """Mean, median and worst tenth of the clips, and an interval for the mean over prompts."""
    if isinstance(values[0], str):
        return {"unavailable": values[0]}
    told = {name: _finite(value) for name, value in spread(values, larger_is_better).items()}
    return told | {"interval": interval(_by_prompt(values, seeds)), "each": [_finite(value) for value in values]}


def near(one: float, other: float) -> bool:
    """Whether two densities count as the same."""
    return abs(one - other) <= NEAR + 1e-9


def density_of(row: dict) -> float | None:
    """The density that was asked for; where the method's own settings decided, the one they came to; None for dense."""
    return row["density_achieved"] if row["density_asked"] is None else row["density_asked"]


def over_random(row: dict, rows: list[dict], seeds: int) -> dict | None:
    """How many dB above the random blocks of the nearest density in ``rows``, prompt by prompt; None where there are
    none of the same."""
    density = density_of(row)
    away = lambda one: abs(density_of(one) - density)
    floors = [one for one in rows if one["method"] == "random_blocks" and density_of(one) is not None]
    random = None if density is None else min(floors, key=away, default=None)
    if random is None or not near(density_of(random), density) or row["psnr"] is None:
        return None
    each = [one["psnr"]["each"] for one in (row, random)]
    if None in each[0] + each[1]:
        return None
    mine, its = (_by_prompt(values, seeds) for values in each)
    return {"mean": float((mine - its).mean()), "interval": interval(mine - its)}


def _by_prompt(values: list[float], seeds: int) -> NDArray:
    """The means over the seeds of each prompt, which stand side by side."""
    return np.reshape(values, (-1, seeds)).mean(1)


def _finite(value: float) -> float | None:
    """JSON knows no infinity, which the PSNR of two equal videos is."""
    return value if np.isfinite(value) else None


def _means(judged: list[dict]) -> dict | None:
    """The mean of every dimension over the clips; one that is not available says why."""
    if not judged:
        return None
    numbers = {name for name, value in judged[0].items() if isinstance(value, float)}
    return {name: fmean(one[name] for one in judged) if name in numbers else judged[0][name] for name in judged[0]}


def _latent_error(notes: list[dict]) -> list | None:
    """Relative error of the latents after some of the steps, the mean over the clips: ``[[step, error], ...]``."""
    curves = [note["latent_error"] for note in notes if note["latent_error"]]
    return [[int(step), error] for step, error in np.mean(curves, 0).tolist()] if curves else None


def _strip(frames: NDArray) -> str:
    """A few frames side by side, small, as a WebP picture in base64."""
    chosen = frames[np.linspace(0, len(frames) - 1, min(STRIP_FRAMES, len(frames))).round().astype(int)]
    picture = Image.fromarray(np.concatenate(list(chosen), 1))
    picture.thumbnail((picture.width, STRIP_HEIGHT))
    file = BytesIO()
    picture.save(file, "WEBP", quality=80)
    return base64.b64encode(file.getvalue()).decode()
