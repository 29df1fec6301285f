"""``dit-sparse bench``: what this machine can do."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .terminal import console, names, one_sentence, progress_bars

bench = typer.Typer(help="Measure this machine.", no_args_is_help=True, rich_markup_mode=None)


@bench.command("attention", epilog="Example: dit-sparse bench attention --out attention.json")
def bench_attention(
    out: Annotated[Path, typer.Option("--out", "-o", help="The JSON file.")] = Path("out/attention.json"),
    executor: Annotated[list[str] | None, typer.Option(help="Only these; may be repeated.")] = None,
    grid: Annotated[list[str] | None, typer.Option(help="Token grids such as 21x45x80; may be repeated.")] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="Head sizes; may be repeated.")] = None,
    density: Annotated[list[float] | None, typer.Option("--density", "-d", help="May be repeated.")] = None,
    pattern: Annotated[list[str] | None, typer.Option(help="radial, random_blocks, clusters; may be repeated.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads.")] = None,
    seconds: Annotated[float | None, typer.Option(help="About how long to measure in all.")] = None,
) -> None:
    """Time every executor at hand against the best dense attention."""
    with one_sentence():
        import torch

        from dit_sparse import Grid
        from dit_sparse.eval.bench import attention as measure
        from dit_sparse.output.environment import conditions
        from dit_sparse.output.files import save_json, writable_file

        device = "cuda" if torch.cuda.is_available() else "cpu"
        executors, patterns = tuple(executor or measure.TIMED_EXECUTORS), tuple(pattern or measure.PATTERNS)
        for asked, known in ((executors, measure.EXECUTORS), (patterns, measure.PATTERNS)):
            if unknown := next((name for name in asked if name not in known), None):
                raise ValueError(f"there is no {unknown!r}; there are {', '.join(known)}")
        grids = [Grid.parse(text) for text in grid or ()]
        cases = measure.cases(device, grids, head_dim or (64, 128), density or (), patterns, heads)
        writable_file(out)
        rows, share = [], (seconds or (240 if device == "cuda" else 60)) / len(cases)
        with progress_bars() as stage:
            progress = stage("cases")
            for done, case in enumerate(cases):
                progress(done, len(cases))
                rows += measure.measure_case(case, executors, share)
            progress(len(cases), len(cases))
        note = f"{cases[0].heads} heads, medians of runs that took turns"
        save_json(out, {"rows": rows, "note": note} | conditions(device))
    _print_bench(rows)
    console.print(f"{len(rows)} rows in {escape(str(out))}")


@bench.command("transformer", epilog="Example: dit-sparse bench transformer --model wan2.1-1.3b --density 0.25")
def bench_transformer(
    out: Annotated[Path, typer.Option("--out", "-o", help="The JSON file.")] = Path("out/transformer.json"),
    model: Annotated[list[str] | None, typer.Option(help="Only these; may be repeated.")] = None,
    method: Annotated[str, typer.Option("--method", "-m", help="One of `dit-sparse methods`.")] = "radial",
    density: Annotated[list[float] | None, typer.Option("--density", "-d", help="May be repeated.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Forward passes of each kind: 2 on a GPU, else 3.")] = None,
) -> None:
    """Time one forward pass of full-size models with random weights; scaled down in proportion on a CPU."""
    with one_sentence():
        import torch

        from dit_sparse import SparseAttnProcessor
        from dit_sparse.eval.bench import transformer as measure
        from dit_sparse.output.environment import conditions
        from dit_sparse.output.files import save_json, writable_file

        device = "cuda" if torch.cuda.is_available() else "cpu"
        rounds = rounds or (2 if device == "cuda" else 3)
        models, densities = tuple(model or measure.MODELS), tuple(density or measure.DENSITIES)
        if unknown := next((name for name in models if name not in measure.MODELS), None):
            raise ValueError(f"there is no model {unknown!r}; there are {', '.join(measure.MODELS)}")
        for value in densities:
            SparseAttnProcessor(method, density=value)
        writable_file(out)
        rows = []
        with progress_bars() as stage:
            for name in models:
                progress = stage(name)
                progress(0, len(densities))
                for row in measure.measure_model(name, device, densities, method, rounds):
                    rows.append(row)
                    progress(sum(r["model"] == name for r in rows), len(densities))
        scaled = "" if device == "cuda" else "one layer, 256 channels and tokens in proportion, "
        note = f"{scaled}random weights, medians of {rounds} forward passes, dense ones taken beside the sparse"
        save_json(out, {"rows": rows, "note": note} | conditions(device))
    _print_transformers(rows)
    console.print(f"{len(rows)} rows in {escape(str(out))}")


@bench.command("scaling", epilog="Example: dit-sparse bench scaling --methods radial,svg --frames 8,16,32,64,128")
def bench_scaling(
    out: Annotated[Path, typer.Option("--out", "-o", help="The JSON file; its pictures lie beside it.")] = Path(
        "out/scaling.json"
    ),
    methods: Annotated[str | None, typer.Option(help="Names, separated by commas.")] = None,
    density: Annotated[float, typer.Option("--density", "-d", help="Beside the methods' own settings.")] = 0.25,
    frames: Annotated[str, typer.Option(help="Lengths in tokens, separated by commas.")] = "8,16,32,64,128",
    frame: Annotated[str, typer.Option(help="Tokens of a frame, HEIGHTxWIDTH.")] = "30x52",
    most_tokens: Annotated[int | None, typer.Option(min=1, help="Longest sequence that scorers look at.")] = None,
) -> None:
    """Cost and density of methods as videos grow longer, with the fitted exponents."""
    with one_sentence():
        from dit_sparse import Grid
        from dit_sparse.eval.bench import scaling
        from dit_sparse.output.files import save_figure, save_json, writable_file

        grid = Grid.parse(f"1x{frame}")
        try:
            lengths = [int(length) for length in frames.split(",")]
        except ValueError:
            raise ValueError(f"--frames is lengths separated by commas, such as 8,16,32, not {frames[:60]!r}") from None
        compared = scaling.METHODS if methods is None else names(methods)
        size = {"height": grid.height, "width": grid.width, "max_tokens": most_tokens}
        task = scaling.Scaling(compared, density, lengths, **size)
        writable_file(out)
        with progress_bars() as stage:
            result = task.run(stage("plans"))
        save_json(out, result)
        for setting, what in (("own", "density"), ("fixed", "modelled_seconds")):
            save_figure(out.with_name(f"{out.stem}-{setting}.png"), scaling.cost_chart(result, what, setting))
    _print_exponents(result["exponents"])
    console.print(f"{len(result['rows'])} rows in {escape(str(out))}, pictures beside it")


def _print_exponents(found: dict) -> None:
    table = Table("method", "own settings", "fixed density", box=None, header_style="bold")
    told = lambda fit: (
        "-" if not fit or fit["exponent"] is None else f"n^{fit['exponent']:.2f} ({fit['points']} lengths)"
    )
    for name, fits in found.items():
        table.add_row(escape(name), told(fits.get("own")), told(fits.get("fixed")))
    console.print(table)


def _print_bench(rows: list[dict]) -> None:
    """A table for every shape of the inputs; times in milliseconds, and "ideal" is density times the dense one."""
    ran, ms = [row for row in rows if "why_not" not in row], lambda seconds: f"{1000 * seconds:.2f}"
    for shape, alike in groupby(ran, lambda r: f"{r['tokens']} x {r['head_dim']}, {r['dtype']}"):
        alike = list(alike)
        fastest = min(alike, key=lambda r: r["dense_seconds"])
        console.print(f"\n{shape}: dense attention takes {ms(fastest['dense_seconds'])} ms by {fastest['dense']}")
        columns = ("pattern", "executor", "ms", "speed-up", "ideal", "TFLOP/s", "plan", "order")
        table = Table(box=None, header_style="bold")
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
        for r in alike:
            speed = (f"{r['speedup']:.2f}x", f"{1 / r['cost_per_block']:.0%}", f"{r['tflops']:.2f}")
            beside = (ms(r["planning_seconds"]), ms(r["permute_seconds"]))
            table.add_row(f"{r['pattern']} {r['density']:.2f}", r["executor"], ms(r["seconds"]), *speed, *beside)
        console.print(table)
    console.print()
    for name, reason in sorted({(r["executor"], r["why_not"]) for r in rows if "why_not" in r}):
        console.print(f"{name} did not run everywhere: {reason}", highlight=False, markup=False)


def _print_transformers(rows: list[dict]) -> None:
    table = Table(
        "model", "layers", "tokens", "density", "dense, s", "sparse, s", "ratio", box=None, header_style="bold"
    )
    for r in rows:
        shape = (r["model"], str(r["layers"]), str(r["tokens"]), f"{r['density']:.2f}")
        table.add_row(*shape, f"{r['seconds_dense']:.2f}", f"{r['seconds_sparse']:.2f}", f"{r['speedup']:.2f}x")
    console.print(table)
