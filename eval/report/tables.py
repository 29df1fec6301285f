"""Markdown tables of stored results: of the JSON files in ``eval/results/``, or of one comparison."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from dit_sparse.eval.bench.attention import PATTERNS
from dit_sparse.eval.study.report import to_markdown as study_to_markdown

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "eval" / "results"


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


def study_tables() -> str:
    """Return the report of every ``eval/results/*/study-routed.json``."""
    return "\n\n".join(
        study_to_markdown(json.loads(path.read_text())).rstrip() for path in stored_results("study-*.json")
    )


def stored_results(pattern: str) -> list[Path]:
    return sorted(RESULTS.glob(f"*/{pattern}"))


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


def markdown(columns: Sequence[str], rows: Iterable[Sequence]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows])


def _measured_on(result: dict) -> str:
    return f"{result['device']}, torch {result['versions']['torch']}, commit {result['commit']}, {result['note']}."
