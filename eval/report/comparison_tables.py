"""Markdown tables of comparisons, and the order and notes of their rows, which the HTML report shares."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from dit_sparse.eval.quality.measures import MEASURES
from dit_sparse.methods import KINDS, kind_of

from .fewer_steps import fewer_steps_note
from .tables import RESULTS, markdown, stored_results

BASELINES = ("dense", "random_blocks")
KIND_TITLES = {kind: f"{kind}s" for kind in ("baseline", *KINDS, "profile")} | {"other": "other methods"}
MAX_CHANGES = 8  # rows that a note lists by name
TIMING_NOTE = "Clips of an earlier run keep its timings, and small differences in speed may be noise of the machine."


def compare_tables() -> str:
    """Return the table of every ``eval/results/*/compare.json`` at the density closest to 0.25."""
    tables = []
    for path in sorted(RESULTS.glob("*/compare.json")):
        result = json.loads(path.read_text())
        tables.append(compare_table(result, min(result["densities"], key=lambda density: abs(density - 0.25))))
    return "\n\n".join(tables)


def routed_tables() -> str:
    """Return the table of every ``eval/results/*/compare-routed-*.json``."""
    return "\n\n".join(compare_table(json.loads(path.read_text())) for path in stored_results("compare-routed-*.json"))


def second_model_tables() -> str:
    """Return the fidelity of every row of ``eval/results/*/compare-shapes-wan-i2v.json``, without times."""
    tables = []
    for result in (json.loads(path.read_text()) for path in stored_results("compare-shapes-wan-i2v.json")):
        rows = sorted((row for row in result["rows"] if row["psnr"]), key=lambda row: -row["psnr"]["mean"])
        cells = (
            (
                f"`{row['name']}`",
                f"{row['psnr']['mean']:.1f}{_bounds(row['psnr']['interval'])}",
                f"{row['ssim']['mean']:.3f}",
                "-" if row["error"] is None else f"{row['error']:.2f}",
            )
            for row in rows
        )
        columns = ("row", "PSNR (dB)", "SSIM", "output error")
        tables.append(f"{markdown(columns, cells)}\n\n{compare_conditions(result)}")
    return "\n\n".join(tables)


def branches_tables() -> str:
    """Return a table for every ``eval/results/*/compare-per-branch.json`` and the ``compare.json`` next to it."""
    tables = []
    for path in sorted(RESULTS.glob("*/compare-per-branch.json")):
        shared, separate = (json.loads(path.with_name(name).read_text()) for name in ("compare.json", path.name))
        tables.append(branches_table(shared, separate))
    return "\n\n".join(tables)


def branches_table(shared: dict, separate: dict) -> str:
    """Return the common rows of two comparisons: one plan shared by both branches of guidance, and a plan per branch.

    Raises:
        ValueError: the comparisons differ in anything else.
    """
    same = ("model", "call", "prompts", "seeds", "schedule", "executor", "block", "versions", "device")
    expected = shared | {"schedule": shared["schedule"] | {"per_branch": True}}
    if differ := [name for name in same if expected[name] != separate[name]]:
        raise ValueError(f"comparisons with one plan and with two must not differ in {', '.join(differ)}")
    others = {row["name"]: row for row in shared["rows"] if row["error"] and row["method"] != "random_blocks"}
    pairs = [(others[row["name"]], row) for row in separate["rows"] if row["name"] in others]
    gain = lambda pair: pair[0]["psnr"]["mean"] - pair[1]["psnr"]["mean"]
    rows = [
        (f"`{pair[0]['name']}`", *(f"{row['psnr']['mean']:.1f}{_bounds(row['psnr']['interval'])}" for row in pair))
        + (f"{gain(pair):+.1f}", *(f"{row['planning_share']:.0%}" for row in pair))
        for pair in sorted(pairs, key=gain, reverse=True)
    ]
    columns = ("row", "PSNR (dB), shared plan", "PSNR (dB), plan per branch", "gain of sharing (dB)")
    columns += ("planning overhead, shared", "planning overhead, per branch")
    guidance = separate["call"]["guidance_scale"]
    return f"{markdown(columns, rows)}\n\nGuidance {guidance:g}; {compare_conditions(separate)}"


def compare_table(result: dict, density: float | None = None) -> str:
    """Return the rows of a comparison by density and kind, then fidelity to the dense video, and the conditions.

    Args:
        density: only the rows of this density, those without one, and the dense runs of the same cost as any of them.
    """
    rows = result["rows"]
    if density is not None:
        rows = [row for row in rows if row["density_asked"] in (None, density)]
        names = {row["name"] for row in rows}
        rows = [row for row in rows if names.intersection(row.get("equal_to", names))]
    number = lambda value, digits: "-" if value is None else f"{value:.{digits}f}"
    mean = lambda spread: spread and spread["mean"]
    cells = [
        (
            row_kind(r),
            ", ".join(filter(None, (f"`{r['name']}`", row_note(r, result["rows"])))),
            number(r["density_achieved"], 2) + _tail_note(r) + (" (!)" if r["density_hit"] is False else ""),
            number(r["density_run"], 2),
            number(r["error"], 2),
            number(r["retained"], 2),
            number(mean(r["psnr"]), 1) + _bounds(r["psnr"] and r["psnr"]["interval"]),
            number(mean(r["over_random"]), 1),
            number(mean(r["ssim"]), 3),
            f"{r['speedup']:.2f}x",
            f"{r['attention_speedup']:.2f}x",
            f"{r['planning_share']:.0%}",
            *([measured_on(r)] if result.get("sources") else []),
        )
        for r in sorted(rows, key=row_order)
    ]
    columns = ("kind", "row", "density", "run density", "output error", "retained mass", "PSNR (dB)")
    columns += ("over random (dB)", "SSIM", "denoising speedup", "attention speedup", "planning overhead")
    columns += ("measured on",) if result.get("sources") else ()
    notes = (compare_conditions(result), fewer_steps_note(rows), TIMING_NOTE, *completeness_notes(result))
    return f"{markdown(columns, cells)}\n\n{' '.join(filter(None, notes))}"


def _tail_note(row: dict) -> str:
    """Return the pairs with pooled terms, which cost as much as others, for the density of a row."""
    tail = row.get("tail_density") or 0.0
    return f" + {tail:.2f}" if tail >= 0.005 else ""


def row_note(row: dict, rows: Sequence[dict]) -> str:
    """Return the settings that the density of a row was solved to, why its density is not met, and `same_cost_note`."""
    solved = [f"solved to {method} on {grid}" for grid, method in row.get("resolved", {}).items()]
    return "; ".join(filter(None, (same_cost_note(row, rows), *solved, row.get("density_note"))))


def same_cost_note(row: dict, rows: Sequence[dict]) -> str:
    """Return which rows a dense run with fewer steps costs as much as, "" for other rows.

    A density is listed instead of its rows if most of them have this cost.
    """
    by_density = Counter(one["density_asked"] for one in rows)
    equal = [one for one in rows if one["name"] in row.get("equal_to", ())]
    equal_by_density = Counter(one["density_asked"] for one in equal)
    densities = sorted(d for d in equal_by_density.keys() - {None} if equal_by_density[d] > by_density[d] / 2)
    names = [f"{density:g}" for density in densities]
    names += [one["name"] for one in equal if one["density_asked"] not in densities]
    return f"same cost as {', '.join(names)}" if names else ""


def completeness_notes(result: dict) -> list[str]:
    """Return warnings: an unfinished comparison, failed rows, a busy machine, or clips of other commits."""
    notes = []
    if not result.get("finished", True):
        notes.append(f"Unfinished: only the first {len(result['rows'])} rows are here.")
    if failures := result.get("failures"):
        notes.append(f"Failed: {'; '.join('{name} ({error})'.format(**one) for one in failures)}.")
    busy = [row["name"] for row in result["rows"] if row.get("busy_clips")]
    if busy:
        which = f"{len(busy)} rows" if len(busy) > MAX_CHANGES else ", ".join(busy)
        notes.append(f"Times of {which} are not reliable: the load average was above the number of cores.")
    others = {commit for row in result["rows"] for commit in row.get("commits", ())} - {result["commit"]}
    if others and not result.get("sources"):
        notes.append(f"Some clips were generated at {', '.join(sorted(others))}, with the same sources.")
    return notes + _merge_notes(result)


def _merge_notes(result: dict) -> list[str]:
    """Return which comparisons a merged result is made of, and in which numbers they differ."""
    if not (sources := result.get("sources")):
        return []
    parts = "; ".join(f"{one['rows']} rows, {one['device']}, commit {one['commit']}" for one in sources)
    notes = [f"Merged comparisons: {parts}. Speedups are over the dense run of the same comparison."]
    changes = [
        f"{one['name']} ({', '.join(f'{name} {kept}, not {other}' for name, (kept, other) in one['numbers'].items())})"
        for one in result["differences"]
    ]
    if changes:
        more = f"; {len(changes) - MAX_CHANGES} more in compare.json" if len(changes) > MAX_CHANGES else ""
        notes.append(
            f"Rows of several comparisons are taken from the first, and other numbers of the same row are left out: "
            f"{'; '.join(changes[:MAX_CHANGES])}{more}."
        )
    return notes


def measured_on(row: dict) -> str:
    """Return the device and the commits of a row of a merged result, "-" for other rows."""
    return f"{row['device']}, {', '.join(row['commits'])}" if row.get("device") else "-"


def unavailable_measures(rows: Sequence[dict]) -> dict[str, str]:
    """Return the titles of measures that were asked for and are missing, with the reason."""
    reasons = {}
    for name, measure in MEASURES.items():
        for row in rows:
            if reason := (row.get(name) or {}).get("unavailable"):
                reasons[measure.title.split(" (")[0]] = reason
    return reasons


def row_kind(row: dict) -> str:
    """Return the kind of a row of a comparison, a key of ``KIND_TITLES``; older results do not contain it."""
    return "baseline" if row["method"] in BASELINES else row.get("kind") or kind_of(row["method"])


def row_order(row: dict) -> tuple:
    """Return the sort key of a row: density, kind, then the most similar to the dense video first."""
    psnr = row["psnr"] and row["psnr"]["mean"]
    kinds = list(KIND_TITLES)
    kind = row_kind(row)
    return row["density_asked"] or 0, kinds.index(kind) if kind in kinds else len(kinds), -(psnr or 999)


def count_clips(result: dict) -> str:
    """Return the numbers of prompts and seeds of each row in words."""
    prompts, seeds = len(result["prompts"]), result["seeds"]
    first = result.get("first_seed", 0)
    if seeds == 1:
        return f"{prompts} prompt{'s' * (prompts > 1)}" + (f", seed {first}" if first else "")
    numbers = f" ({first} to {first + seeds - 1})" if first else ""
    return f"{prompts} prompt{'s' * (prompts > 1)}, {seeds} seeds each{numbers}"


def _bounds(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f" [{bounds[0]:.1f}, {bounds[1]:.1f}]"


def compare_conditions(result: dict) -> str:
    schedule = result["schedule"]
    return (
        f"`{result['model']}`, {count_clips(result)}, {', '.join(result['grids'])} tokens, {result['steps']} steps, "
        f"dense_steps={schedule['dense_steps']}, {result['device']}, torch {result['versions']['torch']}, "
        f"commit {result['commit']}."
    )
