"""``dit-sparse eval`` and ``ab``: metrics of a video, the export for VBench, the analysis of attention masks, and blind
votes of people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ..bundled import BUNDLED
from .options import (
    Block,
    DenseSteps,
    Densities,
    Frames,
    Height,
    Measures,
    Methods,
    Model,
    OutFolder,
    Prompts,
    Steps,
    Width,
    call_arguments,
    count_or_fraction,
    measure_list,
    method_list,
    numbers,
    read_prompts,
)
from .shared.command import CommandGroup
from .terminal import console, decimals, make_number_table, make_table, one_sentence, print_result, progress_bars

if TYPE_CHECKING:
    from dit_sparse.eval.preference.ranking import Ranking

evaluate = CommandGroup(help="Evaluate videos and attention masks.")


@evaluate.command(epilog="Example: dit-sparse eval video out/demo/sparse.mp4 --reference out/demo/dense.mp4")
def video(
    path: Annotated[Path, typer.Argument(help="A video file.")],
    reference: Annotated[Path | None, typer.Option(help="The dense video of the same prompt and seed.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt of the video.")] = None,
    measures: Measures = "all",
) -> None:
    """Score a video with VBench-style metrics, and its fidelity to a reference. Metrics whose package or weights are
    missing are listed as unavailable."""
    with one_sentence():
        from dit_sparse.eval.quality.fidelity import fidelity
        from dit_sparse.eval.quality.vbench_style import quality
        from dit_sparse.output.media import read_video

        chosen = measure_list(measures)
        frames, fps = read_video(path)
        to_reference = None if reference is None else fidelity(frames, read_video(reference)[0], fps, chosen)
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
    model: Model = BUNDLED,
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


def ab(
    results: Annotated[
        Path,
        typer.Argument(
            help="A folder of `dit-sparse compare`, or one with a folder of videos for each method; there, videos of "
            "the same prompt and seed have the same file name."
        ),
    ],
    row: Annotated[
        list[str] | None, typer.Option(help="A row of the comparison, or a folder; may be repeated. Default: all.")
    ] = None,
    votes: Annotated[Path | None, typer.Option(help="The file of votes. Default: votes.jsonl in the folder.")] = None,
    table: Annotated[
        bool, typer.Option("--table", help="Print the ranking of the votes so far, without a page.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the ranking to this .png, .svg or .pdf file.")] = None,
    host: Annotated[
        str, typer.Option(help="Address of the page; 0.0.0.0 for other devices of the network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the page.")] = 7860,
    allow_host: Annotated[list[str] | None, typer.Option(help="Another name of this machine in URLs.")] = None,
) -> None:
    """Collect blind votes on pairs of clips on a web page, and rank the methods by a Bradley-Terry model.

    The page shows two clips of the same prompt and seed without names, in random order, to any number of raters. Votes
    are stored at once; the same command continues. Ctrl-C stops the page and prints the ranking. With --table or --plot
    only the ranking is made.
    """
    with one_sentence():
        from dit_sparse.eval.preference.ranking import rank
        from dit_sparse.eval.preference.votes import VoteFile
        from dit_sparse.output.files import save_figure, writable_figure

        if not results.is_dir():
            raise ValueError(f"there is no folder {results}")
        file = VoteFile(votes or results / "votes.jsonl")
        if plot:
            writable_figure(plot, "--plot")
        if not (table or plot):
            _serve(results, row or [], file, host, port, allow_host or [])
        given = [vote for vote in file.read() if not row or vote.methods <= {*row}]
        if not given and not (table or plot):
            console.print("no votes yet")
            return
        ranking = rank(given)
        if plot:
            save_figure(plot, _plot(ranking))
    print_result(ranking.as_dict())
    _print(ranking)


def _serve(results: Path, rows: list[str], file, host: str, port: int, hosts: list[str]) -> None:
    """Run the page until Ctrl-C."""
    from tempfile import TemporaryDirectory

    from dit_sparse.demo.blind_test import BlindTest
    from dit_sparse.eval.preference.clip_source import read_clip_source

    source = read_clip_source(results, rows)
    try:
        from dit_sparse.demo.blind_test_page import launch
    except ImportError as error:
        raise ValueError(f"cannot import {error.name}: run pip install -e '.[demo]'") from None
    with TemporaryDirectory(prefix="blind-test-") as folder:
        blocks = launch(BlindTest(source, file, Path(folder).resolve()), host, port, hosts, quiet=True)
        console.print(
            f"{len(source.methods)} methods on {escape(blocks.local_url)}, votes in {escape(str(file.path))}; "
            "Ctrl-C stops the page",
            soft_wrap=True,
        )
        try:
            blocks.block_thread()
        finally:
            blocks.close(verbose=False)


def _print(ranking: Ranking) -> None:
    for group, reference in enumerate(ranking.references):
        console.print(_table(ranking, group, reference))
    people = f"{ranking.raters} rater{'s' * (ranking.raters > 1)}"
    prompts = f"{ranking.prompts} prompt{'s' * (ranking.prompts > 1)}"
    console.print(
        f"{ranking.votes} votes of {people} on {prompts}. strength: log-odds of being preferred to the reference; "
        "low, high: its 95 % interval over prompts (bootstrap); preferred: how often to the reference",
        highlight=False,
    )
    for note in ranking.notes:
        console.print(escape(note), highlight=False, soft_wrap=True)


def _table(ranking: Ranking, group: int, reference: str | None) -> Table:
    title = f"Preference, relative to {reference or 'the mean of the methods'}"
    columns = ("votes", "won", "tied", "lost", "strength", "low", "high", "preferred")
    table = make_number_table(title, "method", *columns)
    for row in (row for row in ranking.rows if row.group == group):
        low, high = row.interval or (None, None)
        numbers = (decimals(value, 2) for value in (row.strength, low, high))
        counts = map(str, (row.votes, row.wins, row.ties, row.losses))
        table.add_row(escape(row.method), *counts, *numbers, f"{row.preferred:.0%}")
    return table


def _plot(ranking: Ranking):
    from dit_sparse.plotting.plots import Point, plot_intervals

    rows = [row for row in ranking.rows if row.group == 0]
    points = [Point(row.method, row.method, row.votes, row.strength, *(row.interval or (None, None))) for row in rows]
    ends = [end for point in points for end in (point.y, point.low, point.high) if end is not None]
    margin = 0.05 * (max(ends) - min(ends)) or 1.0
    title = f"Preference: {ranking.votes} votes, {ranking.prompts} prompts"
    label = f"log-odds against {ranking.references[0] or 'the mean'}"
    return plot_intervals(points, title, label, (min(ends) - margin, max(ends) + margin))
