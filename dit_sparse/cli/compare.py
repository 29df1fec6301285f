"""``dit-sparse compare``, ``report`` and ``reproduce``: methods compared with dense attention and with papers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ..bundled import BUNDLED
from .options import (
    Block,
    DenseSteps,
    Densities,
    DensityRamp,
    Engine,
    Executor,
    Frames,
    Height,
    Kinds,
    Measures,
    Model,
    OutFolder,
    Prompts,
    Seeds,
    Steps,
    Width,
    Workers,
    call_arguments,
    count_or_fraction,
    density_ramp,
    measure_list,
    method_list,
    numbers,
    read_prompts,
)
from .terminal import (
    console,
    decimals,
    make_number_table,
    make_table,
    one_sentence,
    print_error,
    print_result,
    progress_bars,
)

QUICK_PROMPTS, QUICK_STEPS = 2, 6


def compare(
    methods: Annotated[
        str,
        typer.Option(
            help="Rows, separated by commas: all, or methods such as 'radial(sink=true)', 'pooled(svg2)', profile:X. "
            "METHOD@0.3 is one row at this density, METHOD@own one at the method's own settings."
        ),
    ] = "all",
    kind: Kinds = None,
    density: Densities = "0.25",
    prompts: Prompts = "4",
    seeds: Seeds = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first clip of each prompt.")] = 0,
    model: Model = BUNDLED,
    dense_steps: DenseSteps = "0.25",
    ramp: DensityRamp = None,
    executor: Executor = "auto",
    block: Block = None,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    per_branch: Annotated[
        bool,
        typer.Option("--per-branch", help="Separate plans for the branches of guidance; slower and less accurate."),
    ] = False,
    quality: Annotated[bool, typer.Option("--quality", help="Also score each clip with VBench-style metrics.")] = False,
    measures: Measures = "fast",
    quick: Annotated[bool, typer.Option("--quick", help="A quick run: two prompts, six steps, short clips.")] = False,
    engine: Engine = "local",
    workers: Workers = None,
    out: OutFolder = Path("out/compare"),
) -> None:
    """Compare methods with dense attention and with each other. The same command resumes an interrupted comparison.

    Clips are reused while model, settings and sources stay the same; a comparison of more methods adds to them. If rows
    fail, the others are completed, and the exit code is 1. With --engine ray, the workers of a Ray cluster share the
    prompts.
    """
    with one_sentence():
        from dit_sparse import Schedule
        from dit_sparse.eval.comparison.comparison import QUICK_CALL, Comparison
        from dit_sparse.eval.comparison.ray_runner import runner_class
        from dit_sparse.eval.report.page import write_page

        make_runner = runner_class(engine, workers)
        call = {"num_inference_steps": QUICK_STEPS} if quick else {}
        if quick and model == BUNDLED:
            call = QUICK_CALL
        task = Comparison(
            methods=method_list(methods),
            kinds=method_list(kind or ""),
            prompts=read_prompts(prompts)[: QUICK_PROMPTS if quick else None],
            densities=numbers(density),
            seeds=seeds,
            first_seed=seed,
            out=out,
            schedule=Schedule(
                dense_steps=count_or_fraction(dense_steps), per_branch=per_branch, density_ramp=density_ramp(ramp)
            ),
            executor=executor,
            block=block,
            quality=quality,
            measures=measure_list(measures),
            model=model,
            call=call | call_arguments(steps, frames, height, width, min_steps=2),
        )
        with progress_bars() as stage:
            result = task.run(stage, make_runner)
        write_page(result, out / "report.html")
    print_result(result)
    _print_comparison(result)
    console.print(
        f"{len(result['prompts'])} prompts, {result['device']}; {escape(str(out / 'report.html'))}", soft_wrap=True
    )
    _end_with_failures(result)


def report(
    results: Annotated[list[Path], typer.Argument(help="Folders of `dit-sparse compare`, or their compare.json.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the merged compare.json. Default: write none."),
    ] = None,
    html: Annotated[bool, typer.Option("--html", help="Write report.html next to compare.json.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table with all columns, notes and conditions, in Markdown.")
    ] = False,
) -> None:
    """Print the tables of a comparison, or write its HTML report, from compare.json.

    Several comparisons of the same model, call, schedule, prompts and seeds are merged; devices and commits may differ.
    """
    with one_sentence():
        from dit_sparse.eval.comparison.merge import merge_results
        from dit_sparse.eval.comparison.result_schema import read_result
        from dit_sparse.eval.report.comparison_tables import compare_table
        from dit_sparse.eval.report.page import write_page
        from dit_sparse.output.files import save_json, writable_folder

        paths = [path / "compare.json" if path.is_dir() else path for path in results]
        path = out / "compare.json" if out else paths[0]
        if html and not out and len(paths) > 1:
            raise ValueError("the report of several comparisons needs a folder: name one with --out")
        if out and path.resolve() in {each.resolve() for each in paths}:
            raise ValueError(f"--out must not be the folder of a given comparison, got {out}")
        contents = [read_result(each) for each in paths]
        result = merge_results(contents, list(map(str, paths))) if len(paths) > 1 or out else contents[0]
        if out:
            writable_folder(out, ("compare.json", "report.html"))
            save_json(path, result)
        page = path.with_name("report.html")
        if html:
            write_page(result, page)
    print_result({"page": str(page)} if html else result)
    if html:
        console.print(f"open {escape(str(page))} in a browser")
    elif markdown:
        console.print(compare_table(result), highlight=False, markup=False, soft_wrap=True)
    else:
        _print_comparison(result)


def reproduce(
    recipe: Annotated[str | None, typer.Argument(help="Name or TOML file of a recipe. Default: list them.")] = None,
    prompts: Prompts = "4",
    seeds: Seeds = 1,
    executor: Executor = "auto",
    engine: Engine = "local",
    workers: Workers = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Output folder. Default: out/RECIPE.")] = None,
) -> None:
    """Repeat the experiment of a paper, and print published and measured results."""
    with one_sentence():
        from dit_sparse.eval.comparison.ray_runner import runner_class
        from dit_sparse.eval.comparison.reproduce import Recipe, published_and_measured, recipes
        from dit_sparse.eval.report.comparison_tables import completeness_notes
        from dit_sparse.eval.report.page import write_page

        if recipe is None:
            print_result([{"name": name, "title": Recipe.load(name).title} for name in recipes()])
            for name in recipes():
                console.print(f"{name:28} {Recipe.load(name).title}", highlight=False)
            return
        paper, make_runner = Recipe.load(recipe), runner_class(engine, workers)
        folder = out or Path("out") / Path(recipe).stem
        task = paper.comparison(read_prompts(prompts), folder, seeds, executor)
        paper.check_call()
        console.print(f"{paper.title}\n{paper.source}, on {paper.hardware}", highlight=False, markup=False)
        with progress_bars() as stage:
            result = task.run(stage, make_runner)
        write_page(result, folder / "report.html")
    rows = list(published_and_measured(paper, result))
    print_result({"recipe": paper.title, "rows": rows, "comparison": result})
    console.print(_reproduction_table(rows))
    console.print(f"published / measured on {result['device']}; {escape(str(folder / 'report.html'))}", soft_wrap=True)
    console.print("published speedups are end-to-end, measured speedups are of the denoising")
    for note in completeness_notes(result):
        console.print(note, highlight=False, markup=False)
    _end_with_failures(result)


def _end_with_failures(result: dict) -> None:
    """Print the rows of a comparison that failed, and exit with code 1 if there are any."""
    for failure in result["failures"]:
        print_error(f"{failure['name']} failed: {failure['error']}")
    if result["failures"]:
        raise typer.Exit(1)


def _print_comparison(result: dict) -> None:
    """Print a table for each density, and what they show."""
    from dit_sparse.eval.report.comparison_tables import completeness_notes, unavailable_measures
    from dit_sparse.eval.report.fewer_steps import fewer_steps_note

    for table in (*_comparison_tables(result["rows"]), *_measure_tables(result["rows"])):
        console.print(table)
    console.print(
        "error: relative error of the attention output; mass: retained attention mass; PSNR in dB; "
        "planning: share of the attention time",
        highlight=False,
    )
    for name, reason in unavailable_measures(result["rows"]).items():
        console.print(f"{name} is not available: {reason}", highlight=False, markup=False)
    for note in filter(None, (fewer_steps_note(result["rows"]), *completeness_notes(result))):
        console.print(note, highlight=False, markup=False)


def _comparison_tables(rows: list[dict]) -> Iterator[Table]:
    """Yield a table for each density, with the rows by kind."""
    from dit_sparse.eval.report.comparison_tables import KIND_TITLES, row_kind, row_order

    headings = ("density", "error", "mass", "PSNR", "SSIM", "speedup", "attention speedup", "planning")
    for density, group in groupby(sorted(rows, key=row_order), lambda row: row["density_asked"]):
        table = make_number_table(f"Density {density:g}" if density else "No density requested", "method", *headings)
        for kind, of_kind in groupby(group, row_kind):
            table.add_row(f"[bold]{KIND_TITLES.get(kind, kind)}[/]")
            for row in of_kind:
                table.add_row(*_comparison_cells(row))
        yield table


def _measure_tables(rows: list[dict]) -> Iterator[Table]:
    """Yield a table for each density with the measures of fidelity that its rows have, besides PSNR and SSIM."""
    from dit_sparse.eval.quality.measures import MEASURES, REQUIRED
    from dit_sparse.eval.report.comparison_tables import row_order

    for density, group in groupby(sorted(rows, key=row_order), lambda row: row["density_asked"]):
        group = [row for row in group if row["psnr"]]
        names = [
            name for name in MEASURES if name not in REQUIRED and any("mean" in (row.get(name) or ()) for row in group)
        ]
        if names:
            title = f"Density {density:g}" if density else "No density requested"
            headings = (MEASURES[name].title for name in names)
            table = make_number_table(f"{title}: fidelity to the dense video", "method", *headings)
            for row in group:
                means = ((row.get(name) or {}).get("mean") for name in names)
                cells = (decimals(mean, MEASURES[name].digits) for name, mean in zip(names, means, strict=True))
                table.add_row(escape(row["name"] if density is None else row["method"]), *cells)
            yield table


def _comparison_cells(row: dict) -> tuple[str, ...]:
    mean = lambda statistics: statistics and statistics["mean"]
    name = row["name"] if row["density_asked"] is None else row["method"]
    return (
        escape(name),
        decimals(row["density_achieved"], 3) + ("!" if row["density_hit"] is False else ""),
        decimals(row["error"], 2),
        decimals(row["retained"], 2),
        decimals(mean(row["psnr"]), 1),
        decimals(mean(row["ssim"]), 3),
        f"{row['speedup']:.2f}x",
        f"{row['attention_speedup']:.2f}x",
        f"{row['planning_share']:.0%}",
    )


def _reproduction_table(rows: list[dict]) -> Table:
    columns = {"density": "density", "psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS", "speedup": "speedup"}
    table = make_table("row", *columns.values())
    digits = lambda value: "-" if value is None else f"{value:.3g}"
    for row in rows:
        table.add_row(escape(row["row"]), *(" / ".join(map(digits, row[column])) for column in columns))
    return table
