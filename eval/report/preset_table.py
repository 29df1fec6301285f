"""Markdown table of the presets, with their rows of the stored comparisons and the baselines of the same cost."""

from __future__ import annotations

from dataclasses import replace

from dit_sparse import SparseAttnProcessor
from dit_sparse.methods import name_of
from dit_sparse.notation.presets import PRESETS

from .comparison_tables import compare_conditions
from .method_page import stored_comparisons
from .tables import markdown

COLUMNS = ("preset", "method", "density", "PSNR (dB)", "SSIM", "denoising speedup", "attention speedup")


def preset_table() -> str:
    """Return a row for every preset, then random blocks and dense attention with fewer steps, and the conditions.

    The rows are those of the first stored comparison that has a preset.
    """
    methods = {preset: SparseAttnProcessor(preset).settings.method for preset in PRESETS}
    keys = {preset: (name_of(replace(method, density=None)), method.density) for preset, method in methods.items()}
    default = SparseAttnProcessor().settings.method
    results = (result for result in stored_comparisons() if any(_row(result, *key) for key in keys.values()))
    result = next(results, {"rows": []})
    cells = []
    for preset, (name, density) in keys.items():
        title = f"`{preset}`" + (" (default)" if methods[preset] == default else "")
        cells.append((title, _link(name), f"{density:g}", *_numbers(_row(result, name, density))))
    for density in sorted({density for _, density in keys.values()}, reverse=True):
        numbers = _numbers(_row(result, "random_blocks", density))
        cells.append(("random blocks", _link("random_blocks"), f"{density:g}", *numbers))
    for row in result["rows"]:
        if row.get("equal_to") and row["method"] == "dense":
            cells.append((row["name"], _link("dense"), "-", *_numbers(row)))
    conditions = f"\n\n{compare_conditions(result)}" if result["rows"] else ""
    return markdown(COLUMNS, cells) + conditions


def schedule_table() -> str:
    """Return a row for every transformer class to which a preset gives a schedule of a paper."""
    classes = {name: None for preset in PRESETS.values() for name in preset.schedules}
    rows = []
    for name in classes:
        schedules = [preset.schedules.get(name) for preset in PRESETS.values()]
        texts = ("default" if one is None else _fields_text(one.schedule) for one in schedules)
        sources = {one.source: None for one in schedules if one is not None}
        rows.append((f"`{name}`", *texts, "; ".join(sources)))
    return markdown(("transformer class", *(f"`{preset}`" for preset in PRESETS), "source"), rows)


def _fields_text(schedule: dict) -> str:
    return ", ".join(f"`{name}={value:g}`" for name, value in schedule.items())


def _link(name: str) -> str:
    return f"[`{name}`](methods.md#{name})"


def _row(result: dict, name: str, density: float) -> dict | None:
    """Return the row of a method at a density, or None if the comparison has none."""
    return next((row for row in result["rows"] if row["method"] == name and row["density_asked"] == density), None)


def _numbers(row: dict | None) -> tuple[str, ...]:
    """Return PSNR with its interval, SSIM and speedups of a row."""
    if row is None or not row["psnr"]:
        return ("-",) * 4
    low, high = row["psnr"]["interval"] or (None, None)
    interval = "" if low is None else f" [{low:.1f}, {high:.1f}]"
    psnr, ssim = f"{row['psnr']['mean']:.1f}{interval}", f"{row['ssim']['mean']:.3f}"
    return psnr, ssim, f"{row['speedup']:.2f}x", f"{row['attention_speedup']:.2f}x"
