"""``dit-sparse``: the commands. Wrong input is one sentence and exit code 2, before any long work."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .batch import batch
from .bench import bench
from .evaluate import judge, report, reproduce
from .measure import compare, count_or_fraction, profile
from .terminal import console, one_sentence, progress_bars

app = typer.Typer(
    help="Sparse attention for video diffusion transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")
app.add_typer(judge, name="eval")
app.command(epilog="Example: dit-sparse batch prompts.txt --density 0.25 --out out/batch")(batch)
app.command(epilog="Example: dit-sparse compare --methods radial,svg,adaspa --density 0.15,0.25 --prompts 2")(compare)
app.command(epilog="Example: dit-sparse report out/compare --html")(report)
app.command(epilog="Example: dit-sparse reproduce wan2.1-t2v-14b-720p --prompts prompts.txt --out out/wan")(reproduce)
app.command(epilog="Example: dit-sparse profile shapes-wan --target-density 0.25 --out profiles/mine.json")(profile)

MethodName = Annotated[str, typer.Option("--method", "-m", help="One of `dit-sparse methods`.")]
Density = Annotated[float | None, typer.Option("--density", "-d", help="Fraction of the pairs to compute, 0 to 1.")]
DenseSteps = Annotated[str | None, typer.Option("--dense-steps", help="First steps kept dense: a count or a fraction.")]
Executor = Annotated[str, typer.Option(help="auto, or an executor of `dit-sparse doctor`.")]
Block = Annotated[int | None, typer.Option(help="Tokens in a block.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")]


@app.command(epilog="Example: dit-sparse demo --method radial --density 0.2 --out out/demo")
def demo(
    method: MethodName = "radial",
    density: Density = 0.25,
    dense_steps: DenseSteps = None,
    executor: Executor = "auto",
    block: Block = None,
    prompt: Annotated[str | None, typer.Option(help="What the bundled model is to draw.")] = None,
    seed: Seed = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    out: Out = Path("out/demo"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here as well.")] = None,
) -> None:
    """Make one video with the bundled model, dense and sparse, from one seed, and compare them."""
    with one_sentence():
        from dit_sparse import SparseAttnProcessor
        from dit_sparse.bundled import BUNDLED_PROMPT
        from dit_sparse.demo.demo import Demo
        from dit_sparse.output.files import save_json, writable_file

        processor = SparseAttnProcessor(
            method, density=density, dense_steps=count_or_fraction(dense_steps), executor=executor, block=block
        )
        call = {} if steps is None else {"num_inference_steps": steps}
        task = Demo(prompt or BUNDLED_PROMPT, processor, out, seed, call)
        if json_file:
            writable_file(json_file, "--json")
        with progress_bars() as stage:
            result = task.run(stage)
        if json_file:
            save_json(json_file, result)
    _print_comparison(result)
    console.print(f"Videos, pictures and result.json are in {escape(str(out))}")


@app.command(epilog='Example: dit-sparse generate "a green square moves left" --density 0.2 --out out/square.mp4')
def generate(
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    model: Annotated[
        str, typer.Option(help="shapes-wan, a local diffusers folder, or a name on the hub.")
    ] = "shapes-wan",
    method: MethodName = "radial",
    density: Density = 0.25,
    dense_steps: DenseSteps = None,
    executor: Executor = "auto",
    block: Block = None,
    seed: Seed = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; the pipeline's own number if left out.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames to ask the pipeline for.")] = None,
    height: Annotated[int | None, typer.Option(help="Rows of pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Columns of pixels.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale.")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames per second of the file.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The video file.")] = Path("out/video.mp4"),
) -> None:
    """Make one video with any diffusers video model, sparsely."""
    with one_sentence():
        from dit_sparse import SparseAttnProcessor
        from dit_sparse.generation import generate as maker
        from dit_sparse.output.files import writable_folder
        from dit_sparse.output.media import save_video

        processor = SparseAttnProcessor(
            method, density=density, dense_steps=count_or_fraction(dense_steps), executor=executor, block=block
        )
        if out.suffix != ".mp4":
            raise ValueError(f"--out names the video file and ends in .mp4, not {out}")
        writable_folder(out.parent)
        given = {
            "num_inference_steps": steps,
            "num_frames": frames,
            "height": height,
            "width": width,
            "guidance_scale": guidance,
        }
        call = {name: value for name, value in given.items() if value is not None}
        if wrong := next((name for name, value in call.items() if value <= 0), None):
            raise ValueError(f"{wrong} must be positive, not {call[wrong]}")
        pipe = maker.load(model)
        run = processor.attach(pipe)
        with progress_bars() as stage:
            clip = maker.generate(pipe, prompt, seed, maker.usual_call(model) | call, stage(method))
        save_video(out, clip.frames, fps or maker.usual_fps(model))
    console.print(escape(str(run.report())))
    console.print(f"{len(clip.frames)} frames in {clip.seconds:.1f} s: {escape(str(out))}")


@app.command(epilog="Example: dit-sparse methods --json")
def methods(json_out: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List the methods, their settings and their papers."""
    from dit_sparse.eval.report.readme import method_rows

    rows = method_rows()
    if json_out:
        print(json.dumps(rows, indent=2))
        return
    table = Table("method", "what it keeps", "settings", box=None, header_style="bold")
    table.add_column("paper", overflow="fold")
    for row in rows:
        settings = ", ".join(f"{name}={value}" for name, value in row["settings"].items())
        table.add_row(row["name"], row["summary"], settings, re.sub("https://(arxiv.org/abs/)?", "", row["source"]))
    console.print(table)


@app.command(epilog="Example: dit-sparse show radial --grid 21x45x80 --density 0.25 --png mask.png")
def show(
    method: Annotated[str, typer.Argument(help="One of `dit-sparse methods`.")],
    grid: Annotated[
        str, typer.Option(help="frames x height x width in tokens, text before or after: 226+13x30x45.")
    ] = "21x20x20",
    density: Density = 0.25,
    block: Annotated[int, typer.Option(help="Tokens in a block.")] = 128,
    png: Annotated[Path | None, typer.Option(help="Draw it into this file as well.")] = None,
) -> None:
    """Draw the mask of a method on a grid."""
    with one_sentence():
        import torch

        from dit_sparse import Grid, Plan, Site
        from dit_sparse.methods import method as method_named
        from dit_sparse.output.files import save_figure, writable_folder
        from dit_sparse.plotting.masks import plot_plan, terminal_map

        where, chosen = Grid.parse(grid), method_named(method, density=density)
        if not 16 <= block <= 256:
            raise ValueError(f"block is 16 to 256 tokens, not {block}")
        if png:
            writable_folder(png.parent)
        nothing = torch.zeros(1, 1, where.tokens, 8)
        plan = chosen.plan(nothing, nothing, Site(where, block), {}) or Plan.dense(where.tokens, block)
        if not isinstance(plan, Plan):
            raise ValueError(f"{method} clusters tokens by what they hold, so there is no mask to draw without a video")
        if png:
            save_figure(png, plot_plan(plan, where, method))
    console.print(terminal_map(plan), highlight=False, markup=False)
    console.print(f"{method}  {where}  {plan.blocks} blocks of {block}  density {plan.density:.3f}", highlight=False)


@app.command(epilog="Example: dit-sparse doctor --json > environment.json")
def doctor(
    json_out: Annotated[bool, typer.Option("--json", help="As JSON, for an issue.")] = False,
    quick: Annotated[bool, typer.Option(help="Do not try what has to compile for long.")] = False,
) -> None:
    """Say what this machine can run, and why not the rest."""
    with one_sentence():
        from dit_sparse.eval.bench.executor_support import check_executors

        found = check_executors(compile_executors=not quick)
    if json_out:
        print(json.dumps(found, indent=2))
        return
    console.print(f"device   {escape(found['device'])}", highlight=False)
    console.print("versions " + ", ".join(f"{name} {number or '-'}" for name, number in found["versions"].items()))
    table = Table("executor", "verdict", box=None, header_style="bold")
    for name, verdict in found["executors"].items():
        table.add_row(name, escape(verdict))
    console.print(table)


def main() -> None:
    app()


def _print_comparison(result: dict) -> None:
    table = Table("", "dense", result["method"], "ratio", box=None, header_style="bold")
    by_step = [result[f"attention_by_step_{which}"] for which in ("dense", "sparse")]
    first = result["dense_steps"]
    rows = {
        "denoising, s": (result["seconds_dense"], result["seconds_sparse"]),
        "attention, s": (result["attention_seconds_dense"], result["attention_seconds_sparse"]),
    }
    if first:
        rows[f"- first {first} steps, dense"] = [sum(seconds[:first]) for seconds in by_step]
        rows[f"- other {result['steps'] - first} steps"] = [sum(seconds[first:]) for seconds in by_step]
    for label, (dense, sparse) in rows.items():
        table.add_row(label, f"{dense:.1f}", f"{sparse:.1f}", f"{dense / sparse:.2f}x" if sparse else "-")
    achieved = "-" if result["density_achieved"] is None else f"{result['density_achieved']:.3f}"
    table.add_row("density in sparse calls", "1", achieved)
    table.add_row("density of the whole run", "1", f"{result['density_run']:.3f}")
    table.add_row("PSNR to dense, dB", "", f"{result['psnr']:.1f}")
    table.add_row("SSIM to dense", "", f"{result['ssim']:.3f}")
    console.print(table)
    console.print(
        f"{result['steps']} steps, {result['grid']} tokens, {result['executor']}, {result['device']}", highlight=False
    )


if __name__ == "__main__":
    sys.exit(main())
