"""``dit-sparse eval``: metrics of a video, the export for VBench, and the analysis of attention masks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .options import (
    Block,
    DenseSteps,
    Densities,
    Frames,
    Height,
    Methods,
    Model,
    OutFolder,
    Prompts,
    Steps,
    Width,
    call_arguments,
    count_or_fraction,
    method_list,
    numbers,
    read_prompts,
)
from .shared.command import CommandGroup
from .terminal import console, make_table, one_sentence, print_result, progress_bars

evaluate = CommandGroup(help="Evaluate videos and attention masks.")


@evaluate.command(epilog="Example: dit-sparse eval video out/demo/sparse.mp4 --reference out/demo/dense.mp4")
def video(
    path: Annotated[Path, typer.Argument(help="A video file.")],
    reference: Annotated[Path | None, typer.Option(help="The dense video of the same prompt and seed.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt of the video.")] = None,
) -> None:
    """Score a video with VBench-style metrics, and its fidelity to a reference. Metrics whose weights are missing are
    listed as unavailable."""
    with one_sentence():
        from dit_sparse.eval.quality.fidelity import fidelity
        from dit_sparse.eval.quality.vbench_style import quality
        from dit_sparse.output.media import read_video

        frames, fps = read_video(path)
        to_reference = None if reference is None else fidelity(frames, read_video(reference)[0])
        result = {"quality": quality(frames, prompt, fps), "fidelity": to_reference}
    print_result(result)
    for name, value in result["quality"].items():
        _print_metric(name, value)
    for name, statistics in (to_reference or {}).items():
        _print_metric(name, statistics if "unavailable" in statistics else statistics["pooled"])


@evaluate.command(epilog="Example: dit-sparse eval export out/compare --row 'radial 0.25' --out out/vbench")
def export(
    results: Annotated[Path, typer.Argument(help="A folder of `dit-sparse compare`.")],
    row: Annotated[str, typer.Option(help="Name of the row in the table of the comparison.")] = "dense",
    out: OutFolder = Path("out/vbench"),
) -> None:
    """Export the clips of a row in the format of the official VBench tool."""
    with one_sentence():
        from dit_sparse.eval.comparison.clip_store import ClipStore
        from dit_sparse.eval.comparison.result_schema import read_result
        from dit_sparse.eval.quality.vbench_export import clips_of_row
        from dit_sparse.eval.quality.vbench_export import export as write
        from dit_sparse.generation.generate import default_fps

        result = read_result(results / "compare.json")
        rows = {candidate["name"]: candidate for candidate in result["rows"]}
        if row not in rows:
            raise ValueError(f"there is no row {row!r}; there are {', '.join(rows)}")
        if not (results / "clips").is_dir():
            raise ValueError(f"{results} has no clips: run `dit-sparse compare` with this folder again")
        listed = write(out, clips_of_row(ClipStore(results / "clips"), result, rows[row]), default_fps(result["model"]))
    count = len(result["prompts"]) * result["seeds"]
    print_result({"videos": count, "listed_in": str(listed)})
    console.print(f"{count} videos, listed in {escape(str(listed))}", soft_wrap=True)


@evaluate.command(epilog="Example: dit-sparse eval attention --methods radial,svg,svg2 --density 0.15,0.25")
def attention(
    methods: Methods = "random_blocks,radial,svg,subblock",
    density: Densities = "0.25",
    prompts: Prompts = "1",
    model: Model = "shapes-wan",
    dense_steps: DenseSteps = "0.25",
    block: Block = None,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    out: OutFolder = Path("out/attention"),
) -> None:
    """Measure the attention mass that masks retain, the maximum for masks of the same density, and the error of the
    output."""
    with one_sentence():
        from dit_sparse import Schedule
        from dit_sparse.eval.analysis import mask_analysis as analysis
        from dit_sparse.output.files import save_figure, save_json, writable_folder

        task = analysis.MaskAnalysis(
            methods=method_list(methods),
            densities=numbers(density),
            prompts=read_prompts(prompts),
            schedule=Schedule(dense_steps=count_or_fraction(dense_steps)),
            block=block,
            model=model,
            call=call_arguments(steps, frames, height, width, min_steps=2),
        )
        writable_folder(out)
        with progress_bars() as stage:
            result = task.run(stage)
        save_json(out / "analysis.json", result)
        for number, row in enumerate(result["rows"]):
            save_figure(out / f"{number:02d}.png", analysis.plot_efficiency(row))
    print_result(result)
    columns = {"density": "density", "retained": "retained mass", "best": "upper bound"}
    columns |= {"efficiency": "efficiency", "error": "relative error"}
    table = make_table("method", *columns.values())
    for row in result["rows"]:
        table.add_row(escape(row["method"]), *(f"{row[column]:.3f}" for column in columns))
    console.print(table)
    console.print(
        f"{', '.join(result['grids'])} tokens, {result['device']}; {escape(str(out / 'analysis.json'))}", soft_wrap=True
    )


def _print_metric(name: str, value: float | dict | str) -> None:
    text = f"{value:.4g}" if isinstance(value, float) else value
    console.print(f"{name:24} {text}", highlight=False, markup=False, soft_wrap=True)
