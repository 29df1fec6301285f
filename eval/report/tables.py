"""What was measured, as tables: from the JSON files in ``eval/results/``, and from a comparison of one's own."""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from dit_sparse.eval.bench.attention import PATTERNS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "eval" / "results"
TIMED = (
    "Clips kept from an earlier run bring the seconds of that time, and machines have slow minutes: small differences "
    "in speed may be theirs."
)


def demo_table() -> str:
    """One row for every ``eval/results/*/demo-*.json``."""
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
    columns = ("method", "density", "whole run", "PSNR, dB", "SSIM", "denoising", "attention")
    return markdown(columns, rows) + "\n\n" + _demo_conditions(results)


def compare_tables() -> str:
    """What every ``eval/results/*/compare.json`` found at the density that is nearest to .25."""
    tables = []
    for path in sorted(RESULTS.glob("*/compare.json")):
        result = json.loads(path.read_text())
        tables.append(compare_table(result, min(result["densities"], key=lambda density: abs(density - 0.25))))
    return "\n\n".join(tables)


def branches_tables() -> str:
    """From every ``eval/results/*/compare-per-branch.json`` and the ``compare.json`` beside it."""
    tables = []
    for path in sorted(RESULTS.glob("*/compare-per-branch.json")):
        shared, apart = (json.loads(path.with_name(name).read_text()) for name in ("compare.json", path.name))
        tables.append(branches_table(shared, apart))
    return "\n\n".join(tables)


def branches_table(shared: dict, apart: dict) -> str:
    """The rows that two comparisons have in common, with one plan for both branches and with a plan for each. Raises
    ValueError where the comparisons differ in more than that."""
    same = ("model", "call", "prompts", "seeds", "schedule", "executor", "block", "versions", "device")
    told = shared | {"schedule": shared["schedule"] | {"per_branch": True}}
    if differ := [name for name in same if told[name] != apart[name]]:
        raise ValueError(f"comparisons with one plan and with two differ in {', '.join(differ)}, too")
    others = {row["name"]: row for row in shared["rows"] if row["error"] and row["method"] != "random_blocks"}
    pairs = ((others[row["name"]], row) for row in apart["rows"] if row["name"] in others)
    gain = lambda pair: pair[0]["psnr"]["mean"] - pair[1]["psnr"]["mean"]
    rows = (
        (f"`{one['name']}`", *(f"{row['psnr']['mean']:.1f}{_between(row['psnr']['interval'])}" for row in (one, two)))
        + (f"{gain((one, two)):+.1f}", *(f"{row['planning_share']:.0%}" for row in (one, two)))
        for one, two in sorted(pairs, key=gain, reverse=True)
    )
    columns = ("row", "PSNR, one plan", "PSNR, a plan each", "dB", "planning, one plan", "planning, a plan each")
    return f"{markdown(columns, rows)}\n\nGuidance {apart['call']['guidance_scale']:g}; {_compare_conditions(apart)}"


def compare_table(result: dict, density: float | None = None) -> str:
    """One row a method and density of a comparison, the nearest to dense first, and the conditions; or only the rows of
    one density, those without one, and the dense ones that cost as much as any of them."""
    rows = result["rows"]
    if density is not None:
        rows = [row for row in rows if row["density_asked"] in (None, density)]
        names = {row["name"] for row in rows}
        rows = [row for row in rows if names.intersection(row.get("equal_to", names))]
    told = lambda value, digits: "-" if value is None else f"{value:.{digits}f}"
    mean = lambda spread: spread and spread["mean"]
    quality = lambda row: (row["density_asked"] or 0, -(mean(row["psnr"]) or 999))
    rows = [
        (
            f"`{r['name']}`" + costs_like(r, result["rows"]),
            told(r["density_achieved"], 2) + (" (!)" if r["density_hit"] is False else ""),
            told(r["density_run"], 2),
            told(r["error"], 2),
            told(r["retained"], 2),
            told(mean(r["psnr"]), 1) + _between(r["psnr"] and r["psnr"]["interval"]),
            told(mean(r["over_random"]), 1),
            told(mean(r["ssim"]), 3),
            f"{r['speedup']:.2f}x",
            f"{r['attention_speedup']:.2f}x",
            f"{r['planning_share']:.0%}",
        )
        for r in sorted(rows, key=quality)
    ]
    columns = ("row", "density", "whole run", "error", "kept", "PSNR, dB", "over random", "SSIM")
    columns += ("denoising", "attention", "planning")
    told = f"{markdown(columns, rows)}\n\n{_compare_conditions(result)} {TIMED}"
    return f"{told} {unfinished(result)}".rstrip()


def costs_like(row: dict, rows: Sequence[dict]) -> str:
    """What has the cost of a dense row with fewer steps: densities, where most rows of a density have it, else rows."""
    asked = Counter(one["density_asked"] for one in rows)
    alike = [one for one in rows if one["name"] in row.get("equal_to", ())]
    often = Counter(one["density_asked"] for one in alike)
    whole = sorted(density for density in often.keys() - {None} if often[density] > asked[density] / 2)
    told = [f"{density:g}" for density in whole]
    told += [one["name"] for one in alike if one["density_asked"] not in whole]
    return f", costs like {', '.join(told)}" if told else ""


def unfinished(result: dict) -> str:
    """A warning about a comparison that was stopped, or still runs."""
    return "" if result.get("finished", True) else f"Unfinished: only the first {len(result['rows'])} rows are here."


def executor_table() -> str:
    """Speed-up over the best dense attention of the same process at density .25, and what part it is of dividing by the
    density, by the shape of the plan, from ``eval/results/*/attention.json``."""
    rows, notes = [], []
    for path in sorted(RESULTS.glob("*/attention.json")):
        result, speeds, beside = json.loads(path.read_text()), {}, defaultdict(list)
        for r in (row for row in result["rows"] if "why_not" not in row and row["density_asked"] == 0.25):
            shape = (r["executor"], r["dtype"], f"{r['tokens']} x {r['head_dim']}")
            told = f"{r['speedup']:.2f}x ({r['density']:.2f}, {1 / r['cost_per_block']:.0%})"
            speeds.setdefault(shape, {})[r["pattern"]] = told
            beside[r["pattern"]].append((r["planning_seconds"] + r["permute_seconds"]) / r["dense_seconds"])
        rows += [(*shape, *(found.get(name, "-") for name in PATTERNS)) for shape, found in speeds.items()]
        told = ", ".join(f"{name.replace('_', ' ')} {statistics.median(beside[name]):.0%}" for name in beside)
        notes.append(f"{_measured_on(result)} Planning and order take, of dense attention: {told}.")
    columns = ("executor", "dtype", "tokens x head_dim", *(name.replace("_", " ") for name in PATTERNS))
    return markdown(columns, rows) + "\n\n" + " ".join(notes)


def transformer_table() -> str:
    """Seconds of a forward pass, dense and sparse, from ``eval/results/*/transformer.json``."""
    text = []
    for path in sorted(RESULTS.glob("*/transformer.json")):
        result = json.loads(path.read_text())
        rows = (
            (f"`{r['model']}`", r["heads"], r["layers"], f"{r['tokens']:,}", f"{r['density']:.2f}")
            + (f"{r['seconds_dense']:.2f}", f"{r['seconds_sparse']:.2f}", f"{r['speedup']:.2f}x")
            for r in result["rows"]
        )
        columns = ("model", "heads", "layers", "tokens", "density", "dense, s", "sparse, s", "ratio")
        row = result["rows"][0]
        text.append(f"{markdown(columns, rows)}\n\n`{row['method']}`, {row['dtype']}, {_measured_on(result)}")
    return "\n\n".join(text)


def scaling_table() -> str:
    """Fitted exponents of the computed pairs, from ``eval/results/*/scaling.json``."""
    text = []
    for path in sorted(RESULTS.glob("*/scaling.json")):
        result = json.loads(path.read_text())
        rows = []
        for name, fits in result["exponents"].items():
            own = fits["own"]
            wrong = "" if own["standard_error"] is None else f" ± {own['standard_error']:.2f}"
            longest = [r for r in result["rows"] if r["method"] == name and r["setting"] == "own"][-1]
            rows.append(
                (f"`{name}`", f"{own['exponent']:.2f}{wrong}", "{:,} to {:,}".format(*own["tokens"]))
                + (f"{longest['density']:.2f}", f"{longest['planning_seconds']:.2f}")
            )
        columns = ("method, own settings", "exponent", "tokens", "density at the longest", "its plan, s")
        told = f"{result['frame']} tokens a frame, block {result['block']}, {result['heads']} heads, {result['device']}"
        text.append(markdown(columns, rows) + f"\n\n{told}, commit {result['commit']}.")
    return "\n\n".join(text)


def _demo_conditions(results: Sequence[dict]) -> str:
    if not results:
        return ""
    r = results[0]
    same = ("device", "commit", "steps", "dense_steps", "dense_calls", "grid", "seed", "prompt")
    mixed = [key for key in same if len({str(other[key]) for other in results}) > 1]
    speeds = ", ".join(f"{_of_dense_steps(other):.2f}x" for other in results)
    told = (
        f"`{r['model']}`, “{r['prompt']}”, seed {r['seed']}, {r['grid']} tokens, {r['steps']} steps of which the first "
        f"{r['dense_steps']} dense (in them, attention is {speeds}), {r['executor']} executor, {r['device']}, "
        f"torch {r['versions']['torch']}, commit {r['commit']}."
    )
    return told + (f" Rows differ in {', '.join(mixed)}: see their files." if mixed else "")


def _of_dense_steps(result: dict) -> float:
    """How much faster the attention of its dense steps was than that of the dense run."""
    first = slice(result["dense_steps"])
    dense, sparse = (sum(result[f"attention_by_step_{run}"][first]) for run in ("dense", "sparse"))
    return dense / sparse if sparse else 1.0


def clips_told(result: dict) -> str:
    """How many clips there are of a row."""
    prompts, seeds = len(result["prompts"]), result["seeds"]
    return f"{prompts} prompt{'s' * (prompts > 1)}" + (f", {seeds} seeds each" if seeds > 1 else "")


def _between(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f" [{bounds[0]:.1f}, {bounds[1]:.1f}]"


def _compare_conditions(result: dict) -> str:
    schedule = result["schedule"]
    return (
        f"`{result['model']}`, {clips_told(result)}, {', '.join(result['grids'])} tokens, {result['steps']} steps, "
        f"dense_steps={schedule['dense_steps']}, {result['device']}, torch {result['versions']['torch']}, "
        f"commit {result['commit']}."
    )


def markdown(columns: Sequence[str], rows: Iterable[Sequence]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows])


def _measured_on(result: dict) -> str:
    return f"{result['device']}, torch {result['versions']['torch']}, commit {result['commit']}, {result['note']}."
