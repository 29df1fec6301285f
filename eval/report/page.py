"""The report of a comparison: one HTML file without external resources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dit_sparse.eval.quality.measures import MEASURES
from dit_sparse.output.files import atomic_write
from dit_sparse.plotting.plots import Point, plot_intervals, plot_pareto
from dit_sparse.plotting.style import DARK, LIGHT, figure_to_svg

from .comparison_tables import (
    BASELINES,
    KIND_TITLES,
    TIMING_NOTE,
    completeness_notes,
    count_clips,
    measured_on,
    row_kind,
    row_note,
    row_order,
    unavailable_measures,
)
from .fewer_steps import fewer_steps_note

SIZES = {"wide": (5.7, 5.2), "narrow": (3.3, 5.2)}  # inches of the Pareto plots, 100 pixels each on the page
COSTS = {
    "density_run": ("density of the whole run", "Fewer computed pairs are to the left: up and to the left is better."),
    "speedup": ("denoising speedup", "Faster is to the right: up and to the right is better."),
}


@dataclass(frozen=True)
class Column:
    """A column of the table of rows.

    Attributes:
        text: the cell of a row, "-" for none.
        best: chooses the best number of a density.
        explanation: for the list below the table.
    """

    name: str
    text: Callable[[dict], str]
    explanation: str
    best: Callable | None = None


def write_page(result: dict, path: Path) -> None:
    """Write the report of what ``Comparison.run`` returned."""
    with atomic_write(path) as draft:
        draft.write_text(render_page(result), encoding="utf-8")


def render_page(result: dict) -> str:
    """Return the report of what ``Comparison.run`` returned as HTML."""
    options = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), **options)
    rows = [row | {"id": f"row-{number}"} for number, row in enumerate(result["rows"])]
    groups = _groups(rows)
    has_points = bool(_points(rows, "speedup"))
    return environment.get_template("page.html.j2").render(
        themes={"light": LIGHT.css_variables(), "dark": DARK.css_variables()},
        model=result["model"],
        facts=[count_clips(result), f"{', '.join(result['grids'])} tokens", f"{result['steps']} steps"],
        device=result["device"],
        warnings=list(filter(None, (fewer_steps_note(rows), *completeness_notes(result)))),
        pareto=_pareto_figures(rows) if has_points else [],
        intervals=_interval_figures(groups) if has_points else [],
        columns=[column for column in COLUMNS if any(column.text(row) != "-" for row in rows)],
        groups=[(title, [_table_row(row, rows) for row in group]) for title, group in groups],
        timing_note=TIMING_NOTE,
        unavailable=unavailable_measures(rows),
        prompt=result["prompts"][0],
        strips=[(title, [_strip(row) for row in group]) for title, group in groups],
        maps=[(title, [row for row in group if row["mass"]]) for title, group in groups],
        quality=_quality([row for _, group in groups for row in group if row["quality"]]),
        conditions=_conditions(result),
    )


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _spread(metric: str, key: str, digits: int) -> Callable[[dict], str]:
    """Return the text of one number of a measure; the mean PSNR of equal clips is infinite and stored as None."""

    def text(row: dict) -> str:
        spread = row.get(metric)  # older results have fewer measures
        if not spread or key not in spread:
            return "-"
        return "inf" if spread[key] is None else _number(spread[key], digits)

    return text


def _interval(row: dict) -> str:
    bounds = row["psnr"] and row["psnr"]["interval"]
    return f"{bounds[0]:.1f} to {bounds[1]:.1f}" if bounds else "-"


def _measure_column(name: str) -> Column:
    measure = MEASURES[name]
    best = max if measure.larger_is_better else min
    return Column(measure.title, _spread(name, "mean", measure.digits), measure.explanation, best)


COLUMNS = (
    Column("density", lambda row: _number(row["density_achieved"], 3), "computed share of the pairs in sparse calls"),
    Column("run density", lambda row: _number(row["density_run"]), "the same for all calls of the run"),
    _measure_column("psnr"),
    Column("95 % interval", _interval, "of the mean PSNR over prompts (bootstrap)"),
    Column("worst decile", _spread("psnr", "worst_decile", 1), "mean PSNR of the lowest tenth of the clips", max),
    Column("over random (dB)", _spread("over_random", "mean", 1), "PSNR above random blocks of the same density"),
    *(_measure_column(name) for name in MEASURES if name != "psnr"),
    Column("output error", lambda row: _number(row["error"]), "relative error of the attention output", min),
    Column("retained mass", lambda row: _number(row["retained"]), "share of the softmax mass on computed pairs", max),
    Column("denoising speedup", lambda row: f"{row['speedup']:.2f}x", "over the denoising of the dense run"),
    Column("attention speedup", lambda row: f"{row['attention_speedup']:.2f}x", "over the attention of the dense run"),
    Column("planning overhead", lambda row: f"{row['planning_share']:.0%}", "share of planning in the attention time"),
    Column("measured on", measured_on, "device and commits of the clips"),
)


def _groups(rows: Sequence[dict]) -> list[tuple[str, list[dict]]]:
    """Return the rows by requested density and kind, the most similar to the dense video first."""
    groups: dict[str, list[dict]] = {}
    for row in sorted(rows, key=row_order):
        density, kind = row["density_asked"], row_kind(row)
        title = f"Density {density:g}" if density else "No density requested"
        groups.setdefault(f"{title}: {KIND_TITLES.get(kind, kind)}", []).append(row)
    return list(groups.items())


def _table_row(row: dict, rows: Sequence[dict]) -> dict:
    """Return a row with its note and cells. The best numbers of a density are marked, of rows that met it."""
    same_density = (other for other in rows if other["density_asked"] == row["density_asked"])
    candidates = [other for other in same_density if other["density_hit"] and other["method"] not in BASELINES]
    cells = []
    for column in COLUMNS:
        text = column.text(row)
        numbers = [column.text(other) for other in candidates if column.best and column.text(other) != "-"]
        best = row in candidates and text in numbers and float(text) == column.best(map(float, numbers))
        missed = column.name == "density" and row["density_hit"] is False
        cells.append({"column": column, "text": text, "best": best, "missed": missed})
    return row | {"note": row_note(row, rows), "is_baseline": row["method"] in BASELINES, "cells": cells}


def _points(rows: Sequence[dict], x: str) -> list[Point]:
    """Return the rows with a finite PSNR; those of one method form a series, dense runs one each."""
    return [
        Point(
            row["name"],
            row["name"] if row["method"] == "dense" else row["method"],
            row[x],
            row["psnr"]["mean"],
            *(row["psnr"]["interval"] or (None, None)),
            size=4.5 + 5 * (row["density_asked"] or 0.25),
            url=f"#{row['id']}",
        )
        for row in rows
        if row["psnr"] and row["psnr"]["mean"] is not None
    ]


def _pareto_figures(rows: Sequence[dict]) -> list[dict]:
    figures = []
    for x, (x_label, caption) in COSTS.items():
        points = _points(rows, x)
        titles = {point.url: _tooltip(point, x_label) for point in points}
        baselines = {point.series for point in points if point.series.startswith(BASELINES)}
        svgs = {}
        for name, size in SIZES.items():
            figure = plot_pareto(points, x_label, "PSNR (dB)", x == "speedup", baselines, size)
            svgs[name] = figure_to_svg(figure, label=f"PSNR against {x_label}, {name}", titles=titles)
        figures.append({"caption": caption, **svgs})
    return figures


def _interval_figures(groups: Sequence[tuple[str, list[dict]]]) -> list[str]:
    """Return a figure for each group, all with the same axis."""
    points = {title: _points(group, "density_run") for title, group in groups}
    ends = [end for group in points.values() for p in group for end in (p.y, p.low, p.high) if end is not None]
    margin = 0.05 * (max(ends) - min(ends)) or 1.0
    limits = min(ends) - margin, max(ends) + margin
    return [
        figure_to_svg(plot_intervals(group, title, "PSNR (dB)", limits), label=f"Confidence intervals: {title}")
        for title, group in points.items()
        if group
    ]


def _tooltip(point: Point, x_label: str) -> str:
    interval = "" if point.low is None else f", 95 % interval {point.low:.1f} to {point.high:.1f}"
    return f"{point.name}: PSNR {point.y:.1f} dB{interval}; {x_label} {point.x:.2f}"


def _strip(row: dict) -> dict:
    first = row["psnr"]["each"][0] if row["psnr"] else None
    return {"name": row["name"], "data": row["strip"], "psnr": "" if first is None else f"{first:.1f} dB"}


def _quality(rows: Sequence[dict]) -> dict | None:
    """Return the table of the VBench dimensions and the reasons for those without weights."""
    if not rows:
        return None
    scores = rows[0]["quality"]
    title = lambda name: name.replace("_", " ")
    names = [name for name, score in scores.items() if not isinstance(score, dict)]
    return {
        "columns": [title(name) for name in names],
        "rows": [(row["name"], [f"{row['quality'][name]:.4f}" for name in names]) for row in rows],
        "unavailable": {title(name): score["unavailable"] for name, score in scores.items() if name not in names},
    }


def _conditions(result: dict) -> dict[str, str]:
    settings = lambda values: ", ".join(f"{name}={value}" for name, value in values.items())
    dense = (row for row in result["rows"] if row["method"] == "dense")
    return {
        "model": result["model"],
        "call": settings(result["call"]) or "the pipeline's defaults",
        "schedule": settings(result["schedule"]),
        "executor": result["executor"],
        "dense runs": ", ".join(f"{row['name']}: {row['seconds']:.1f} s" for row in dense),
        "device": result["device"],
        "versions": ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version),
        "commit": result["commit"] or "not from a checkout",
        "prompts": "; ".join(result["prompts"]),
    }
