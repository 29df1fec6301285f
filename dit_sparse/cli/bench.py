"""``dit-sparse bench``: benchmarks of executors, transformers and scaling on this machine."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from dit_sparse import DEFAULT_METHOD

from .options import Method, OutJson, method_list
from .shared.command import CommandGroup
from .terminal import console, make_table, one_sentence, print_result, progress_bars, warn_if_busy

REPEATED = "; may be repeated"
DensityList = Annotated[list[float] | None, typer.Option("--density", "-d", help=f"Density{REPEATED}.")]

bench = CommandGroup(help="Benchmarks of this machine.")


@bench.command(epilog="Example: dit-sparse bench attention --out attention.json")
def attention(
    out: OutJson = Path("out/attention.json"),
    executor: Annotated[list[str] | None, typer.Option(help=f"Executor{REPEATED}. Default: all.")] = None,
    grid: Annotated[list[str] | None, typer.Option(help=f"Token grid such as 21x45x80{REPEATED}.")] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help=f"Head dimension{REPEATED}.")] = None,
    density: DensityList = None,
    pattern: Annotated[list[str] | None, typer.Option(help=f"radial, random_blocks or clusters{REPEATED}.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Approximate duration of the benchmark.")] = None,
) -> None:
    """Time the executors, and the fastest dense attention of this machine."""
    with one_sentence():
        import torch

        from dit_sparse import Grid
        from dit_sparse.eval.bench import attention as benchmark
        from dit_sparse.output.environment import conditions
        from dit_sparse.output.files import save_json, writable_file

        device = "cuda" if torch.cuda.is_available() else "cpu"
        executors, patterns = tuple(executor or benchmark.TIMED_EXECUTORS), tuple(pattern or benchmark.PATTERNS)
        for requested, known in ((executors, benchmark.EXECUTORS), (patterns, benchmark.PATTERNS)):
            _check_known("executor or pattern", requested, known)
        grids = [Grid.parse(text) for text in grid or ()]
        cases = benchmark.cases(device, grids, head_dim or (64, 128), density or (), patterns, heads)
        writable_file(out)
        rows, seconds_per_case = [], (seconds or (240 if device == "cuda" else 60)) / len(cases)
        with progress_bars() as stage:
            progress = stage("cases")
            for number, case in enumerate(cases):
                progress(number, len(cases))
                rows += benchmark.measure_case(case, executors, seconds_per_case)
            progress(len(cases), len(cases))
        note = f"{cases[0].heads} heads, medians of interleaved runs"
        result = {"rows": rows, "note": note} | conditions(device)
        save_json(out, result)
    print_result(result)
    warn_if_busy(result)
    _print_executors(rows)
    console.print(f"{len(rows)} rows: {escape(str(out))}", soft_wrap=True)


@bench.command(epilog="Example: dit-sparse bench transformer --model wan2.1-1.3b --method 'radial(sink=true)'")
def transformer(
    out: OutJson = Path("out/transformer.json"),
    model: Annotated[
        list[str] | None, typer.Option(help=f"Model to time, or to scale down{REPEATED}. Default: all.")
    ] = None,
    method: Method = DEFAULT_METHOD,
    density: DensityList = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Timed forward passes, dense and sparse. Default: 2 on a GPU, 3 on a CPU.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the blocks, dense and sparse.")] = False,
) -> None:
    """Time a forward pass of full-size models with random weights; on a CPU, of scaled-down models."""
    with one_sentence():
        import torch

        from dit_sparse import SparseAttnProcessor
        from dit_sparse.eval.bench import transformer as benchmark
        from dit_sparse.output.environment import conditions
        from dit_sparse.output.files import save_json, writable_file

        device = "cuda" if torch.cuda.is_available() else "cpu"
        rounds = rounds or (2 if device == "cuda" else 3)
        models, densities = tuple(model or benchmark.MODELS), tuple(density or benchmark.DENSITIES)
        _check_known("model", models, benchmark.MODELS)
        for value in densities:
            SparseAttnProcessor(method, density=value)
        writable_file(out)
        rows = []
        with progress_bars() as stage:
            for name in models:
                published = benchmark.MODELS[name]
                progress = stage(published.label(name, published.full if device == "cuda" else published.small))
                progress(0, len(densities))
                measured = benchmark.measure_model(name, device, densities, method, rounds, compiled)
                for number, row in enumerate(measured, 1):
                    rows.append(row)
                    progress(number, len(densities))
        scaled = "" if device == "cuda" else "one layer, 256 channels and tokens in proportion, "
        note = f"{scaled}random weights, medians of {rounds} forward passes, dense and sparse interleaved"
        note += ", compiled blocks" if compiled else ""
        result = {"rows": rows, "note": note} | conditions(device)
        save_json(out, result)
    print_result(result)
    warn_if_busy(result)
    _print_transformers(rows)
    console.print(f"{len(rows)} rows: {escape(str(out))}", soft_wrap=True)


@bench.command(epilog="Example: dit-sparse bench scaling --methods 'radial(sink=true),svg' --frames 8,16,32,64,128")
def scaling(
    out: OutJson = Path("out/scaling.json"),
    methods: Annotated[str | None, typer.Option(help="Methods, separated by commas.")] = None,
    density: Annotated[
        float, typer.Option("--density", "-d", help="Density to measure, in addition to the methods' own settings.")
    ] = 0.25,
    frames: Annotated[
        str, typer.Option(help="Video lengths in latent frames, separated by commas.")
    ] = "8,16,32,64,128",
    frame: Annotated[str, typer.Option(help="Tokens of a frame, HEIGHTxWIDTH.")] = "30x52",
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, help="Longest sequence for methods that are not static."),
    ] = None,
) -> None:
    """Measure how the cost of methods grows with the length of the video, and fit exponents."""
    with one_sentence():
        from dit_sparse import Grid
        from dit_sparse.eval.bench import scaling as benchmark
        from dit_sparse.output.files import save_figure, save_json, writable_file

        grid = Grid.parse(f"1x{frame}")
        try:
            lengths = [int(length) for length in frames.split(",")]
        except ValueError:
            message = f"--frames must be lengths separated by commas, such as 8,16,32, got {frames[:60]!r}"
            raise ValueError(message) from None
        names = benchmark.METHODS if methods is None else method_list(methods)
        size = {"height": grid.height, "width": grid.width, "max_tokens": max_tokens}
        task = benchmark.Scaling(names, density, lengths, **size)
        writable_file(out)
        with progress_bars() as stage:
            result = task.run(stage("plans"))
        save_json(out, result)
        for setting, key in (("own", "density"), ("fixed", "modelled_seconds")):
            save_figure(out.with_name(f"{out.stem}-{setting}.png"), benchmark.plot_cost(result, key, setting))
    print_result(result)
    _print_exponents(result["exponents"])
    console.print(f"{len(result['rows'])} rows and two plots: {escape(str(out))}", soft_wrap=True)


@bench.command(epilog="Example: dit-sparse bench tail --tokens 8192 --threads 1,2")
def tail(
    out: OutJson = Path("out/tail.json"),
    tokens: Annotated[int, typer.Option(min=64, help="Length of the sequence.")] = 8192,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.")] = 2,
    head_dim: Annotated[int, typer.Option(min=8, help="Head dimension.")] = 64,
    density: Annotated[float, typer.Option("--density", "-d", min=0.01, max=1.0, help="Density of the plans.")] = 0.25,
    threads: Annotated[str, typer.Option(help="Numbers of CPU threads, separated by commas.")] = "1,2",
    seconds: Annotated[float, typer.Option(help="Approximate duration of the benchmark.")] = 60.0,
) -> None:
    """Measure the cost of pooled tails and of the scores of routed, relative to a dense call."""
    with one_sentence():
        import torch

        from dit_sparse.eval.bench import pooled_tail as benchmark
        from dit_sparse.output.environment import conditions
        from dit_sparse.output.files import save_json, writable_file

        device = "cuda" if torch.cuda.is_available() else "cpu"
        counts = threads.split(",")
        if not all(count.isdecimal() and int(count) for count in counts):
            raise ValueError(f"--threads must be numbers separated by commas, such as 1,2, got {threads[:60]!r}")
        writable_file(out)
        problem = benchmark.Problem(tokens, heads, head_dim, density)
        rows = list(benchmark.measure(problem, [int(count) for count in counts], seconds, device))
        note = "shares of a dense call, medians over interleaved rounds"
        result = {"rows": rows, "note": note} | conditions(device)
        save_json(out, result)
    print_result(result)
    warn_if_busy(result)
    _print_shares(rows)
    console.print(f"{len(rows)} rows: {escape(str(out))}")


@bench.command(epilog="Example: dit-sparse bench planning --methods asa,svg2 --grid 16x32x32")
def planning(
    out: OutJson = Path("out/planning.json"),
    methods: Annotated[str | None, typer.Option(help="Methods, separated by commas. Default: all.")] = None,
    grid: Annotated[str, typer.Option(help="Token grid.")] = "16x32x32",
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.")] = 2,
    head_dim: Annotated[int, typer.Option(min=8, help="Head dimension.")] = 64,
    density: Annotated[float, typer.Option("--density", "-d", min=0.01, max=1.0, help="Density of the plans.")] = 0.25,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    seconds: Annotated[float, typer.Option(help="Approximate duration of the benchmark.")] = 120.0,
) -> None:
    """Measure the planning time of methods, relative to a dense attention call."""
    with one_sentence():
        import torch

        from dit_sparse import METHODS, Grid
        from dit_sparse.eval.bench import planning as benchmark
        from dit_sparse.output.environment import conditions
        from dit_sparse.output.files import save_json, writable_file

        device = "cuda" if torch.cuda.is_available() else "cpu"
        problem = benchmark.Problem(Grid.parse(grid), heads, head_dim, density)
        writable_file(out)
        torch.set_num_threads(threads)
        names = list(METHODS) if methods is None else method_list(methods)
        rows = list(benchmark.measure(names, problem, seconds, device))
        note = "CPU time of a plan as a share of dense attention, medians over interleaved rounds"
        result = problem.settings() | {"rows": rows, "note": note} | conditions(device)
        save_json(out, result)
    print_result(result)
    table = make_table("method", "first step", "later step")
    for row in rows:
        cells = [row["why_not"]] if "why_not" in row else [f"{row[step]:.2%}" for step in ("first", "later")]
        table.add_row(row["method"], *map(escape, cells))
    console.print(table)
    console.print(f"{len(rows)} rows: {escape(str(out))}", soft_wrap=True)


def _check_known(kind: str, names: tuple, known: object) -> None:
    if unknown := next((name for name in names if name not in known), None):
        raise ValueError(f"there is no {kind} {unknown[:60]!r}; there are {', '.join(known)}")


def _print_executors(rows: list[dict]) -> None:
    """Print a table for every shape of the inputs; "of ideal" is the speedup times the density."""
    measured, ms = [row for row in rows if "why_not" not in row], lambda seconds: f"{1000 * seconds:.2f}"
    for shape, group in groupby(measured, lambda row: f"{row['tokens']} x {row['head_dim']}, {row['dtype']}"):
        group = list(group)
        dense = min(group, key=lambda row: row["dense_seconds"])
        console.print(f"\n{shape}: dense attention takes {ms(dense['dense_seconds'])} ms by {dense['dense']}")
        columns = ("pattern", "executor", "ms", "speedup", "of ideal", "TFLOP/s", "plan", "order")
        table = make_table(*columns, numbers=6)
        for row in group:
            speed = (f"{row['speedup']:.2f}x", f"{1 / row['cost_per_block']:.0%}", f"{row['tflops']:.2f}")
            overhead = (ms(row["planning_seconds"]), ms(row["permute_seconds"]))
            pattern = f"{row['pattern']} {row['density']:.2f}"
            table.add_row(pattern, row["executor"], ms(row["seconds"]), *speed, *overhead)
        console.print(table)
    console.print("\nplan: planning overhead (ms); order: time of the permutation (ms)", highlight=False)
    for name, reason in sorted({(row["executor"], row["why_not"]) for row in rows if "why_not" in row}):
        console.print(f"{name} did not run in every case: {reason}", highlight=False, markup=False)


def _print_transformers(rows: list[dict]) -> None:
    table = make_table("model", "layers", "tokens", "density", "dense (s)", "sparse (s)", "speedup")
    for row in rows:
        shape = (row["model"], str(row["layers"]), str(row["tokens"]), f"{row['density']:.2f}")
        seconds = (f"{row['seconds_dense']:.2f}", f"{row['seconds_sparse']:.2f}")
        table.add_row(*shape, *seconds, f"{row['speedup']:.2f}x")
    console.print(table)


def _print_shares(rows: list[dict]) -> None:
    table = make_table("part", "threads", "key tile", "tail or every", "share of dense", "per call")
    for row in rows:
        sizes = (str(row.get("key_tile", "-")), str(row.get("tail", row.get("every", "-"))))
        per_call = row.get("share_per_call", row["share"])
        table.add_row(row["part"], str(row["threads"]), *sizes, f"{row['share']:.1%}", f"{per_call:.1%}")
    console.print(table)


def _print_exponents(exponents: dict) -> None:
    table = make_table("method", "own settings", "fixed density")
    text = lambda fit: (
        "-" if not fit or fit["exponent"] is None else f"n^{fit['exponent']:.2f} ({fit['points']} lengths)"
    )
    for name, fits in exponents.items():
        table.add_row(escape(name), text(fits.get("own")), text(fits.get("fixed")))
    console.print(table)
