"""``dit-sparse report``, ``reproduce`` and ``eval``: results read and drawn, papers measured again, videos judged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .measure import (
    Block,
    DenseSteps,
    Executor,
    Frames,
    Model,
    Prompts,
    Seeds,
    Side,
    Steps,
    count_or_fraction,
    fractions,
    read_prompts,
    size,
)
from .terminal import console, names, one_sentence, progress_bars

judge = typer.Typer(help="Judge videos: by themselves, against another, or for the VBench tool.", no_args_is_help=True)


def report(
    results: Annotated[Path, typer.Argument(help="A folder of `dit-sparse compare`, or its compare.json.")],
    html: Annotated[bool, typer.Option("--html", help="Write report.html beside it.")] = False,
) -> None:
    """Make the table of a comparison, or its page, from its JSON alone."""
    with one_sentence():
        from dit_sparse.eval.comparison.result_schema import read_result
        from dit_sparse.eval.report.page import write_page
        from dit_sparse.eval.report.tables import compare_table

        path = results / "compare.json" if results.is_dir() else results
        result = read_result(path)
        if not html:
            print(compare_table(result))
            return
        page = path.with_name("report.html")
        write_page(result, page)
    console.print(f"{escape(str(page))}: open it in a browser")


def reproduce(
    recipe: Annotated[str | None, typer.Argument(help="Its name, or a TOML file. Without one: what there is.")] = None,
    prompts: Prompts = "4",
    seeds: Seeds = 1,
    executor: Executor = "auto",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; out/RECIPE by default.")] = None,
) -> None:
    """Measure what a paper published, in its own setting, and set the two side by side."""
    with one_sentence():
        from dit_sparse.eval.comparison.reproduce import Recipe, published_and_measured, recipes
        from dit_sparse.eval.report.page import write_page

        if recipe is None:
            for name in recipes():
                console.print(f"{name:28} {Recipe.load(name).title}", highlight=False)
            return
        told = Recipe.load(recipe)
        folder = out or Path("out") / Path(recipe).stem
        task = told.comparison(read_prompts(prompts), folder, seeds, executor)
        told.check_call()
        console.print(f"{told.title}\n{told.source}, on {told.hardware}", highlight=False, markup=False)
        with progress_bars() as stage:
            result = task.run(stage)
        write_page(result, folder / "report.html")
    console.print(_beside(list(published_and_measured(told, result))))
    console.print(f"published / measured here, on {result['device']}; {escape(str(folder / 'report.html'))}")
    console.print("times as fast: published of the whole generation, measured of the denoising")


def _beside(rows: list[dict]) -> Table:
    columns = ("density", "psnr", "ssim", "lpips", "speedup")
    table = Table("row", *columns[:-1], "times as fast", box=None, header_style="bold")
    told = lambda value: "-" if value is None else f"{value:.3g}"
    for row in rows:
        table.add_row(escape(row["row"]), *(" / ".join(map(told, row[column])) for column in columns))
    return table


@judge.command(epilog="Example: dit-sparse eval video out/demo/sparse.mp4 --reference out/demo/dense.mp4")
def video(
    path: Annotated[Path, typer.Argument(help="A video file.")],
    reference: Annotated[Path | None, typer.Option(help="The dense video of the same prompt and seed.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What it was to show.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here as well.")] = None,
) -> None:
    """How good a video is by itself, and how near to a reference. What needs weights that are not here is said so."""
    with one_sentence():
        from dit_sparse.eval.quality.fidelity import fidelity
        from dit_sparse.eval.quality.vbench_style import quality
        from dit_sparse.output.files import save_json, writable_file
        from dit_sparse.output.media import read_video

        if json_file:
            writable_file(json_file, "--json")
        frames, fps = read_video(path)
        against = None if reference is None else fidelity(frames, read_video(reference)[0])
        found = {"quality": quality(frames, prompt, fps), "fidelity": against}
        if json_file:
            save_json(json_file, found)
    for name, value in found["quality"].items():
        console.print(_measure(name, value), highlight=False, markup=False, soft_wrap=True)
    for name, spread in (against or {}).items():
        told = spread if "unavailable" in spread else spread["pooled"]
        console.print(_measure(name, told), highlight=False, markup=False, soft_wrap=True)


@judge.command(epilog="Example: dit-sparse eval export out/compare --row 'radial 0.25' --out out/vbench")
def export(
    results: Annotated[Path, typer.Argument(help="A folder of `dit-sparse compare`.")],
    row: Annotated[str, typer.Option(help="Which row, as its table names it.")] = "dense",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the videos and their list.")] = Path(
        "out/vbench"
    ),
) -> None:
    """Write the clips of a row as the official VBench tool wants them."""
    with one_sentence():
        from dit_sparse.eval.comparison.clip_store import ClipStore
        from dit_sparse.eval.comparison.result_schema import read_result
        from dit_sparse.eval.quality.vbench_export import export as write
        from dit_sparse.eval.quality.vbench_export import of_row
        from dit_sparse.generation.generate import usual_fps

        result = read_result(results / "compare.json")
        rows = {one["name"]: one for one in result["rows"]}
        if row not in rows:
            raise ValueError(f"there is no row {row!r}; there are {', '.join(rows)}")
        if not (results / "clips").is_dir():
            raise ValueError(f"{results} has no clips: run dit-sparse compare into it again")
        listed = write(out, of_row(ClipStore(results / "clips"), result, rows[row]), usual_fps(result["model"]))
    console.print(f"{len(result['prompts']) * result['seeds']} videos, listed in {escape(str(listed))}")


@judge.command(epilog="Example: dit-sparse eval attention --methods radial,svg,svg2 --density 0.15,0.25")
def attention(
    methods: Annotated[str, typer.Option(help="Names, separated by commas.")] = "random_blocks,radial,svg,subblock",
    density: Annotated[str, typer.Option("--density", "-d", help="Fractions, separated by commas.")] = "0.25",
    prompts: Prompts = "1",
    model: Model = "shapes-wan",
    dense_steps: DenseSteps = "0.25",
    block: Block = None,
    steps: Steps = None,
    frames: Frames = None,
    height: Side = None,
    width: Side = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for analysis.json and a picture a row.")] = Path(
        "out/attention"
    ),
) -> None:
    """How much attention masks keep, beside the most that as many pairs could keep, and the error of the output."""
    with one_sentence():
        from dit_sparse import Schedule
        from dit_sparse.eval.analysis import mask_analysis as analysis
        from dit_sparse.output.files import save_figure, save_json, writable_folder

        task = analysis.MaskAnalysis(
            methods=names(methods),
            densities=fractions(density),
            prompts=read_prompts(prompts),
            schedule=Schedule(dense_steps=count_or_fraction(dense_steps)),
            block=block,
            model=model,
            call=size(steps, frames, height, width),
        )
        writable_folder(out)
        with progress_bars() as stage:
            result = task.run(stage)
        save_json(out / "analysis.json", result)
        for number, row in enumerate(result["rows"]):
            save_figure(out / f"{number:02d}.png", analysis.efficiency_map(row))
    figures = ("density", "retained", "best", "efficiency", "error")
    table = Table("method", *figures, box=None, header_style="bold")
    for row in result["rows"]:
        table.add_row(escape(row["method"]), *(f"{row[figure]:.3f}" for figure in figures))
    console.print(table)
    console.print(f"{', '.join(result['grids'])} tokens, {result['device']}; {escape(str(out / 'analysis.json'))}")


def _measure(name: str, value: float | dict | str) -> str:
    return f"{name:24} {value:.4g}" if isinstance(value, float) else f"{name:24} {value}"
