"""Markdown tables of stored results: of the JSON files in ``eval/results/``, or of one comparison."""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from dit_sparse.eval.bench.attention import PATTERNS
from dit_sparse.eval.study.report import to_markdown as study_to_markdown

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "eval" / "results"
TIMING_NOTE = "Clips of an earlier run keep its timings, and small differences in speed may be noise of the machine."


def demo_table() -> str:
    """Return a row for every ``eval/results/*/demo-*.json``."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*/demo-*.json"))]
    results.sort(key=lambda r: (r["device"], -float(r["psnr"])))
    rows = (
        (
            r["method"],
            f"{r['density_achieved']:.2f}",
            f"{r['density_run']:.2f}",
            f"{float(r['psnr']):.1f}",
            f"{r['ssim']:.3f}",
            f"{r['speedup']:.2f}x",
            f"{r['attention_speedup']:.2f}x",
        )
        for r in results
    )
    columns = ("method", "density", "run density", "PSNR (dB)", "SSIM", "denoising speedup", "attention speedup")
    return markdown(columns, rows) + "\n\n" + _demo_conditions(results)


def compare_tables() -> str:
    """Return the table of every ``eval/results/*/compare.json`` at the density closest to 0.25."""
    tables = []
    for path in sorted(RESULTS.glob("*/compare.json")):
        result = json.loads(path.read_text())
        tables.append(compare_table(result, min(result["densities"], key=lambda density: abs(density - 0.25))))
    return "\n\n".join(tables)


def routed_tables() -> str:
    """Return the table of every ``eval/results/*/compare-routed-*.json``."""
    return "\n\n".join(compare_table(json.loads(path.read_text())) for path in _results("compare-routed-*.json"))


def study_tables() -> str:
    """Return the report of every ``eval/results/*/study-routed.json``."""
    return "\n\n".join(study_to_markdown(json.loads(path.read_text())).rstrip() for path in _results("study-*.json"))


def _results(pattern: str) -> list[Path]:
    return sorted(RESULTS.glob(f"*/{pattern}"))


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
    return f"{markdown(columns, rows)}\n\nGuidance {guidance:g}; {_compare_conditions(separate)}"


def compare_table(result: dict, density: float | None = None) -> str:
    """Return the rows of a comparison by density, the most similar to the dense video first, and the conditions.

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
    order = lambda row: (row["density_asked"] or 0, -(mean(row["psnr"]) or 999))
    cells = [
        (
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
        )
        for r in sorted(rows, key=order)
    ]
    columns = ("row", "density", "run density", "output error", "retained mass", "PSNR (dB)", "over random (dB)")
    columns += ("SSIM", "denoising speedup", "attention speedup", "planning overhead")
    notes = (_compare_conditions(result), TIMING_NOTE, unfinished_note(result))
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


def unfinished_note(result: dict) -> str:
    """Return a warning if the comparison was stopped or is still running, else ""."""
    return "" if result.get("finished", True) else f"Unfinished: only the first {len(result['rows'])} rows are here."


def executor_table() -> str:
    """Return speedups over the best dense attention of the same process at density 0.25, by the pattern of the plan.

    In parentheses: the density of the plan, and the speedup relative to the ideal of 1 / density.
    """
    rows, notes = [], []
    for path in sorted(RESULTS.glob("*/attention.json")):
        result, speedups, overheads = json.loads(path.read_text()), {}, defaultdict(list)
        for r in (row for row in result["rows"] if "why_not" not in row and row["density_asked"] == 0.25):
            shape = (r["executor"], r["dtype"], f"{r['tokens']} x {r['head_dim']}")
            cell = f"{r['speedup']:.2f}x ({r['density']:.2f}, {1 / r['cost_per_block']:.0%})"
            speedups.setdefault(shape, {})[r["pattern"]] = cell
            overheads[r["pattern"]].append((r["planning_seconds"] + r["permute_seconds"]) / r["dense_seconds"])
        rows += [(*shape, *(cells.get(name, "-") for name in PATTERNS)) for shape, cells in speedups.items()]
        shares = ", ".join(f"{name.replace('_', ' ')} {statistics.median(overheads[name]):.0%}" for name in overheads)
        notes.append(f"{_measured_on(result)} Planning and reordering take, of the time of dense attention: {shares}.")
    columns = ("executor", "dtype", "tokens x head_dim", *(name.replace("_", " ") for name in PATTERNS))
    return markdown(columns, rows) + "\n\n" + " ".join(notes)


def transformer_table() -> str:
    """Return the seconds of a forward pass, dense and sparse, from ``eval/results/*/transformer.json``."""
    text = []
    for path in sorted(RESULTS.glob("*/transformer.json")):
        result = json.loads(path.read_text())
        rows = (
            (f"`{r['model']}`", r["heads"], r["layers"], f"{r['tokens']:,}", f"{r['density']:.2f}")
            + (f"{r['seconds_dense']:.2f}", f"{r['seconds_sparse']:.2f}", f"{r['speedup']:.2f}x")
            for r in result["rows"]
        )
        columns = ("model", "heads", "layers", "tokens", "density", "dense (s)", "sparse (s)", "speedup")
        row = result["rows"][0]
        text.append(f"{markdown(columns, rows)}\n\n`{row['method']}`, {row['dtype']}, {_measured_on(result)}")
    return "\n\n".join(text)


def tail_table() -> str:
    """Return the costs of pooled tails and of scores as shares of a dense call, from ``eval/results/*/tail.json``."""
    text = []
    for path in sorted(RESULTS.glob("*/tail.json")):
        result, cells = json.loads(path.read_text()), defaultdict(list)
        for row in result["rows"]:
            cells[_part_name(row)] += [f"{row['share']:.1%}", f"{row.get('share_per_call', row['share']):.1%}"]
        threads = sorted({row["threads"] for row in result["rows"]})
        names = ["1 thread" if count == 1 else f"{count} threads" for count in threads]
        columns = [f"{what}, {name}" for name in names for what in ("share of dense", "per sparse call")]
        table = markdown(("part", *columns), [(name, *shares) for name, shares in cells.items()])
        row = result["rows"][0]
        size = f"{row['tokens']:,} tokens, {row['heads']} heads x {row['dim']}, density {row['density']:g}"
        text.append(f"{table}\n\n{size}, {_measured_on(result)}")
    return "\n\n".join(text)


def _part_name(row: dict) -> str:
    if row["part"] == "tail":
        return f"tail of {row['tail']}, key tiles of {row['key_tile']}"
    size = f"one of {row['every']} queries" if "every" in row else f"key tiles of {row['key_tile']}"
    return f"`{row['part']}`, {size}"


def scaling_table() -> str:
    """Return the fitted exponents of the computed pairs, from ``eval/results/*/scaling.json``."""
    text = []
    for path in sorted(RESULTS.glob("*/scaling.json")):
        result = json.loads(path.read_text())
        rows = []
        for name, fits in result["exponents"].items():
            own = fits["own"]
            error = "" if own["standard_error"] is None else f" ± {own['standard_error']:.2f}"
            longest = [r for r in result["rows"] if r["method"] == name and r["setting"] == "own"][-1]
            rows.append(
                (f"`{name}`", f"{own['exponent']:.2f}{error}", "{:,} to {:,}".format(*own["tokens"]))
                + (f"{longest['density']:.2f}", f"{longest['planning_seconds']:.2f}")
            )
        columns = ("method, own settings", "exponent", "tokens", "density at the longest", "planning time there (s)")
        note = f"{result['frame']} tokens per frame, block {result['block']}, {result['heads']} heads"
        text.append(markdown(columns, rows) + f"\n\n{note}, {result['device']}, commit {result['commit']}.")
    return "\n\n".join(text)


def _demo_conditions(results: Sequence[dict]) -> str:
    if not results:
        return ""
    r = results[0]
    same = ("device", "commit", "steps", "dense_steps", "dense_calls", "grid", "seed", "prompt")
    mixed = [key for key in same if len({str(other[key]) for other in results}) > 1]
    speedups = ", ".join(f"{_dense_steps_speedup(other):.2f}x" for other in results)
    conditions = (
        f"`{r['model']}`, “{r['prompt']}”, seed {r['seed']}, {r['grid']} tokens, {r['steps']} steps, the first "
        f"{r['dense_steps']} of them dense (attention speedup in these: {speedups}), {r['executor']} executor, "
        f"{r['device']}, torch {r['versions']['torch']}, commit {r['commit']}."
    )
    return conditions + (f" Rows differ in {', '.join(mixed)}: see their files." if mixed else "")


def _dense_steps_speedup(result: dict) -> float:
    """Return the speedup of attention in the dense steps of the sparse run over the same steps of the dense run."""
    first = slice(result["dense_steps"])
    dense, sparse = (sum(result[f"attention_by_step_{run}"][first]) for run in ("dense", "sparse"))
    return dense / sparse if sparse else 1.0


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


def _compare_conditions(result: dict) -> str:
    schedule = result["schedule"]
    return (
        f"`{result['model']}`, {count_clips(result)}, {', '.join(result['grids'])} tokens, {result['steps']} steps, "
        f"dense_steps={schedule['dense_steps']}, {result['device']}, torch {result['versions']['torch']}, "
        f"commit {result['commit']}."
    )


def markdown(columns: Sequence[str], rows: Iterable[Sequence]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows])


def _measured_on(result: dict) -> str:
    return f"{result['device']}, torch {result['versions']['torch']}, commit {result['commit']}, {result['note']}."
