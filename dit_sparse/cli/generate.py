"""``dit-sparse generate``, ``demo`` and ``app``: one sparse video, and one next to its dense video."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..bundled import BUNDLED, BUNDLED_PROMPT
from .options import (
    Block,
    DenseStepsOrProfile,
    Density,
    DensityRamp,
    Dtype,
    Executor,
    Fps,
    Frames,
    Guard,
    Guidance,
    HeadProfile,
    Height,
    Method,
    Model,
    NegativePrompt,
    Offload,
    OutFolder,
    Preset,
    Seed,
    Steps,
    VaeTiling,
    Width,
    call_arguments,
    count_or_fraction,
    density_ramp,
    method_text,
)
from .terminal import console, make_table, one_sentence, print_result, progress_bars, warn_if_busy


def generate(
    prompt: Annotated[str, typer.Argument(help="What the video shows.")],
    model: Model = BUNDLED,
    method: Method = None,
    preset: Preset = None,
    profile: HeadProfile = None,
    density: Density = None,
    dense_steps: DenseStepsOrProfile = None,
    ramp: DensityRamp = None,
    executor: Executor = "auto",
    block: Block = None,
    guard: Guard = None,
    negative_prompt: NegativePrompt = None,
    seed: Seed = 0,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    guidance: Guidance = None,
    dtype: Dtype = None,
    offload: Offload = None,
    vae_tiling: VaeTiling = False,
    fps: Fps = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The video file to write.")] = Path("out/video.mp4"),
) -> None:
    """Generate one video with sparse attention, with any supported diffusers pipeline.

    A JSON file next to the video lists its settings, the report of the run, versions and commit.
    """
    with one_sentence():
        from dit_sparse import SparseAttnProcessor
        from dit_sparse.generation import generate as generation
        from dit_sparse.generation.batch import Job
        from dit_sparse.generation.checks import check_clip
        from dit_sparse.generation.clip_result import clip_result
        from dit_sparse.generation.loading import LoadOptions
        from dit_sparse.generation.model_config import check_model
        from dit_sparse.notation.reading import shorten_path
        from dit_sparse.output.files import save_json, writable_file
        from dit_sparse.output.media import save_video

        steps_settings = {"dense_steps": count_or_fraction(dense_steps), "density_ramp": density_ramp(ramp)}
        settings = {"executor": executor, "block": block, "guard": guard, **steps_settings}
        processor = SparseAttnProcessor(method_text(method, preset, profile), density=density, **settings)
        if out.suffix != ".mp4":
            raise ValueError(f"--out must be a file that ends in .mp4, got {shorten_path(out)}")
        call = call_arguments(steps, frames, height, width, guidance, negative_prompt)
        call = generation.default_call(model) | call
        options = LoadOptions(dtype, offload, vae_tiling)
        check_model(model)
        fps = generation.default_fps(model) if fps is None else fps
        check_clip(prompt, seed, call, fps, model=model)
        writable_file(out)
        sidecar = writable_file(out.with_suffix(".json"))
        pipe = generation.load_pipeline(model, options=options)
        run = processor.attach(pipe)
        with progress_bars() as stage:
            clip = generation.generate(pipe, prompt, seed, call, stage("denoising"))
        save_video(out, clip.frames, fps)
        job = Job(out.stem, prompt, seed, call, processor, model, fps, options)
        result = clip_result(job.settings, clip, run.report().as_dict(), out)
        save_json(sidecar, result)
    print_result(result)
    warn_if_busy(result)
    console.print(escape(str(run.report())))
    files = f"{escape(str(out))} and its {sidecar.suffix}"
    console.print(f"{len(clip.frames)} frames in {clip.seconds:.1f} s: {files}", soft_wrap=True)


def demo(
    method: Method = None,
    density: Density = None,
    dense_steps: DenseStepsOrProfile = None,
    ramp: DensityRamp = None,
    executor: Executor = "auto",
    block: Block = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt for the bundled model.")] = None,
    seed: Seed = 0,
    steps: Steps = None,
    three_d: Annotated[
        bool, typer.Option("--three-d", help="Generate solids on sparse voxels with shapes-3d. Default method: svg2.")
    ] = False,
    resolution: Annotated[
        int | None, typer.Option(help="With --three-d: cells along each side, an even number. Default: 44.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="With --three-d: folder of the model. Default: eval/models/shapes-3d.")
    ] = None,
    out: OutFolder = Path("out/demo"),
) -> None:
    """Generate one video or solid densely and sparsely from the same seed with a small model, and compare them."""
    settings = {"dense_steps": dense_steps, "density_ramp": ramp, "executor": executor, "block": block}
    if three_d:
        call = {"resolution": resolution, "num_inference_steps": steps}
        return _demo_three_d(method, density, settings, prompt, seed, call, model, out)
    with one_sentence():
        for name, value in (("--resolution", resolution), ("--model", model)):
            if value is not None:
                raise ValueError(f"{name} needs --three-d")
        from dit_sparse import SparseAttnProcessor
        from dit_sparse.demo.demo import Demo

        processor = SparseAttnProcessor(method, density=density, **_parsed(settings))
        task = Demo(BUNDLED_PROMPT if prompt is None else prompt, processor, out, seed, call_arguments(steps))
        with progress_bars() as stage:
            result = task.run(stage)
    print_result(result)
    warn_if_busy(result)
    _print_demo(result)
    console.print(f"videos, plots and result.json: {escape(str(out))}", soft_wrap=True)


def _parsed(settings: dict) -> dict:
    """Return the settings of a demo with its texts parsed.

    Raises:
        ValueError: a text cannot be read.
    """
    parse = {"dense_steps": count_or_fraction, "density_ramp": density_ramp}
    return settings | {name: read(settings[name]) for name, read in parse.items()}


def _demo_three_d(
    method: str | None,
    density: float | None,
    settings: dict,
    prompt: str | None,
    seed: int,
    call: dict,
    model: Path | None,
    out: Path,
) -> None:
    """Run the demo of solids and print its result.

    Args:
        settings: texts of ``dense_steps`` and ``density_ramp``, ``executor`` and ``block``.
        call: arguments of the pipeline's call; None: the default.
    """
    with one_sentence():
        from dit_sparse import SparseAttnProcessor
        from dit_sparse.bundled import SOLID_PROMPT
        from dit_sparse.demo.solids.solid_demo import SolidDemo

        processor = SparseAttnProcessor(method, density=density, **_parsed(settings))
        call = {name: value for name, value in call.items() if value is not None}
        task = SolidDemo(processor, out, SOLID_PROMPT if prompt is None else prompt, seed, call, model)
        with progress_bars() as stage:
            result = task.run(stage)
    print_result(result)
    warn_if_busy(result)
    _print_solid_demo(result)
    console.print(f"meshes, pictures, turntable and result.json: {escape(str(out))}", soft_wrap=True)


def _print_solid_demo(result: dict) -> None:
    table = make_table("", "dense", escape(result["method"]), "speedup")
    for label, name in (("generation time (s)", "seconds"), ("attention time (s)", "attention_seconds")):
        dense, sparse = result[f"{name}_dense"], result[f"{name}_sparse"]
        table.add_row(label, f"{dense:.1f}", f"{sparse:.1f}", f"{dense / sparse:.2f}x" if sparse else "-")
    achieved = result["density_achieved"]
    table.add_row("density of the sparse calls", "1", "-" if achieved is None else f"{achieved:.3f}")
    table.add_row("density of the whole run", "1", f"{result['density_run']:.3f}")
    table.add_row("colour PSNR on rendered views (dB)", "", f"{result['colour_psnr']:.1f}")
    table.add_row("chamfer distance (cells)", "", f"{result['chamfer']:.4f}")
    table.add_row("normal consistency", "", f"{result['normal_consistency']:.3f}")
    console.print(table)
    steps = result["call"]["num_inference_steps"]
    console.print(
        f"{steps} steps, {result['cells']} cells, executor {result['executor']}, {result['device']}", highlight=False
    )


def app(
    model: Annotated[list[str] | None, typer.Option(help="Another model to offer; may be repeated.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Except on localhost, only the offered models run.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 7860,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name of this machine in URLs; may be repeated.")
    ] = None,
) -> None:
    """Start a page that generates one prompt densely and sparsely, and compares the clips."""
    with one_sentence():
        try:
            from dit_sparse.demo.page import serve
        except ModuleNotFoundError as error:
            if error.name != "gradio":
                raise
            raise ValueError("the page needs Gradio: pip install gradio, or in a checkout -e '.[demo]'") from None
        print_result({"address": f"http://{host}:{port}"})
        serve(model or [], host, port, allow_host or [], quiet=console.quiet)


def _print_demo(result: dict) -> None:
    table = make_table("", "dense", escape(result["method"]), "speedup")
    by_step = [result[f"attention_by_step_{kind}"] for kind in ("dense", "sparse")]
    dense_steps = result["dense_steps"]
    seconds = {
        "denoising time (s)": (result["seconds_dense"], result["seconds_sparse"]),
        "attention time (s)": (result["attention_seconds_dense"], result["attention_seconds_sparse"]),
    }
    if dense_steps:
        seconds[f"- first {dense_steps} steps, dense"] = [sum(steps[:dense_steps]) for steps in by_step]
        seconds[f"- other {result['steps'] - dense_steps} steps"] = [sum(steps[dense_steps:]) for steps in by_step]
    for label, (dense, sparse) in seconds.items():
        table.add_row(label, f"{dense:.1f}", f"{sparse:.1f}", f"{dense / sparse:.2f}x" if sparse else "-")
    achieved = result["density_achieved"]
    table.add_row("density of the sparse calls", "1", "-" if achieved is None else f"{achieved:.3f}")
    table.add_row("density of the whole run", "1", f"{result['density_run']:.3f}")
    table.add_row("PSNR (dB)", "", f"{result['psnr']:.1f}")
    table.add_row("SSIM", "", f"{result['ssim']:.3f}")
    console.print(table)
    console.print(
        f"{result['steps']} steps, {result['grid']} tokens, executor {result['executor']}, {result['device']}",
        highlight=False,
    )
