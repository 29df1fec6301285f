"""``dit-sparse compare`` and ``dit-sparse profile``: methods measured on a model, side by side or head by head."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .terminal import console, names, one_sentence, progress_bars

MAX_PROMPTS = 60  # of the bundled ones
QUICK_PROMPTS, QUICK_STEPS = 2, 6

Model = Annotated[str, typer.Option(help="shapes-wan, a local diffusers folder, or a name on the hub.")]
Prompts = Annotated[str, typer.Option(help="How many of the bundled prompts, or a .txt, .csv or .jsonl file of them.")]
Seeds = Annotated[int, typer.Option(min=1, help="Clips of each prompt.")]
Executor = Annotated[str, typer.Option(help="auto, or an executor of `dit-sparse doctor`.")]
DenseSteps = Annotated[str, typer.Option(help="First steps kept dense: a count or a fraction.")]
Steps = Annotated[int | None, typer.Option(min=2, help="Denoising steps.")]
Frames = Annotated[int | None, typer.Option(min=1, help="Frames to ask the pipeline for.")]
Side = Annotated[int | None, typer.Option(min=1, help="In pixels.")]
Block = Annotated[int | None, typer.Option(help="Tokens in a block.")]


def compare(
    methods: Annotated[
        str, typer.Option(help="Names, separated by commas: all, radial, radial|sink, rettention(svg2), profile:NAME.")
    ] = "all",
    density: Annotated[
        str, typer.Option("--density", "-d", help="Fractions of the pairs to compute, separated by commas.")
    ] = "0.25",
    prompts: Prompts = "4",
    seeds: Seeds = 1,
    model: Model = "shapes-wan",
    dense_steps: DenseSteps = "0.25",
    executor: Executor = "auto",
    block: Block = None,
    steps: Steps = None,
    frames: Frames = None,
    height: Side = None,
    width: Side = None,
    per_branch: Annotated[
        bool, typer.Option("--per-branch", help="Plan for each branch of guidance apart: slower, farther from dense.")
    ] = False,
    quality: Annotated[bool, typer.Option("--quality", help="Also judge each clip by itself, VBench-style.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Two prompts, six steps, short clips: a first look.")] = False,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the clips, compare.json and report.html.")
    ] = Path("out/compare"),
) -> None:
    """Compare methods with dense attention and with each other. Killed and called again, it goes on where it was."""
    with one_sentence():
        from dit_sparse import Schedule
        from dit_sparse.eval.comparison.comparison import QUICK_CALL, Comparison
        from dit_sparse.eval.report.page import write_page

        usual = {"num_inference_steps": QUICK_STEPS} if quick else {}
        if quick and model == "shapes-wan":
            usual = QUICK_CALL
        task = Comparison(
            methods=names(methods),
            prompts=read_prompts(prompts)[: QUICK_PROMPTS if quick else None],
            densities=fractions(density),
            seeds=seeds,
            out=out,
            schedule=Schedule(dense_steps=count_or_fraction(dense_steps), per_branch=per_branch),
            executor=executor,
            block=block,
            quality=quality,
            model=model,
            call=usual | size(steps, frames, height, width),
        )
        with progress_bars() as stage:
            result = task.run(stage)
        write_page(result, out / "report.html")
    console.print(_comparison(result["rows"]))
    console.print(f"{len(result['prompts'])} prompts, {result['device']}; {escape(str(out / 'report.html'))}")


def profile(
    model: Annotated[str, typer.Argument(help="shapes-wan, a local diffusers folder, or a name on the hub.")],
    prompts: Prompts = "2",
    candidates: Annotated[
        str, typer.Option(help="Methods to try on every head, separated by commas; vdit stands for its four modes.")
    ] = "svg.spatial,svg.temporal,radial,vdit.vertical,subblock,xattention,asa,sparge",
    target_density: Annotated[float | None, typer.Option(help="Mean density of the heads.")] = None,
    max_error: Annotated[float | None, typer.Option(help="Or: root mean square of the heads' relative errors.")] = None,
    spread: Annotated[
        str | None, typer.Option(help="Densities to try, as multiples of the target: 0.5,1,2. By default all have it.")
    ] = None,
    dense_steps: DenseSteps = "0.25",
    block: Block = None,
    steps: Steps = None,
    frames: Frames = None,
    height: Side = None,
    width: Side = None,
    check: Annotated[Path | None, typer.Option(help="Do not search: does this profile still fit?")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The profile to write.")] = Path("out/profile.json"),
) -> None:
    """Find a method for every head of a model, and write it down as a profile."""
    with one_sentence():
        from dit_sparse import Profile, Schedule
        from dit_sparse.profiling.search import ProfileSearch, compare_with_stored_error

        call = size(steps, frames, height, width)
        if check is not None:
            checked = Profile.load(check)
            with progress_bars() as stage:
                then, now = compare_with_stored_error(checked, model, read_prompts(prompts), call, stage)
            verdict = "it fits" if now <= 1.25 * then else "it has drifted: search again with these prompts or sizes"
            console.print(f"relative error {now:.3f}, {then:.3f} when it was made: {verdict}")
            return
        if target_density is None and max_error is None:
            target_density = 0.25
        task = ProfileSearch(
            model=model,
            prompts=read_prompts(prompts),
            candidates=candidates,
            out=out,
            target_density=target_density,
            max_error=max_error,
            spread=fractions(spread, "--spread") if spread else None,
            schedule=Schedule(dense_steps=count_or_fraction(dense_steps)),
            block=block,
            call=call,
        )
        with progress_bars() as stage:
            made = task.run(stage)
    for letter, entry in made.methods.items():
        settings = ", ".join(f"{name}={value}" for name, value in entry.settings.items())
        console.print(f"  {letter}  {entry.method} {settings}", highlight=False, markup=False)
    console.print("  " + " ".join(made.layers), markup=False)
    told = made.measured
    console.print(f"density {told['density']}, relative error {told['error']}: {escape(str(out))} and its .png")


def read_prompts(text: str) -> list[str]:
    """``"4"``: so many prompts of the bundled model; else those of a file.

    Raises:
        ValueError: neither, or a file that sets more than prompts.
    """
    from dit_sparse.bundled.shapes_wan.judge import held_out_tasks
    from dit_sparse.generation.prompts import read_rows

    if text.isdecimal() and 1 <= int(text) <= MAX_PROMPTS:
        return [task.text for task in held_out_tasks(int(text))]
    if not Path(text).suffix:
        raise ValueError(
            f"--prompts is a number from 1 to {MAX_PROMPTS}, or a .txt, .csv or .jsonl file, not {text[:60]!r}"
        )
    rows = [row for _, row in read_rows(Path(text))]
    more = set().union(*(row.model_dump(exclude_none=True) for row in rows)) - {"prompt", "id"}
    if more:
        raise ValueError(f"{text} sets {', '.join(sorted(more))} too, which only dit-sparse batch reads; leave it out")
    return [row.prompt for row in rows]


def count_or_fraction(text: str | None) -> int | float | None:
    """``"3"`` is a count, ``"0.2"`` a fraction."""
    if text is None:
        return None
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise ValueError(f"--dense-steps is a count such as 3 or a fraction such as 0.2, not {text!r}") from None


def fractions(text: str, option: str = "--density") -> list[float]:
    """``"0.15,0.25"``: both.

    Raises:
        ValueError: something else.
    """
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{option} is numbers separated by commas, such as 0.15,0.25, not {text[:60]!r}") from None


def given(**values: object) -> dict:
    return {name: value for name, value in values.items() if value is not None}


def size(steps: int | None, frames: int | None, height: int | None, width: int | None) -> dict:
    """Arguments of a pipeline."""
    return given(num_inference_steps=steps, num_frames=frames, height=height, width=width)


def _comparison(rows: list[dict]) -> Table:
    columns = ("density", "error", "kept", "dB", "over random", "SSIM", "denoising", "attention", "planning")
    table = Table("method", *columns, box=None, header_style="bold")
    number = lambda value, digits: "-" if value is None else f"{value:.{digits}f}"
    mean = lambda spread: spread and spread["mean"]
    for row in sorted(rows, key=lambda row: (row["density_asked"] or 0, -(mean(row["psnr"]) or 999))):
        table.add_row(
            escape(row["name"]),
            number(row["density_achieved"], 3) + (" !" if row["density_hit"] is False else ""),
            number(row["error"], 2),
            number(row["retained"], 2),
            number(mean(row["psnr"]), 1),
            number(mean(row["over_random"]), 1),
            number(mean(row["ssim"]), 3),
            f"{row['speedup']:.2f}x",
            f"{row['attention_speedup']:.2f}x",
            f"{row['planning_share']:.0%}",
        )
    return table
