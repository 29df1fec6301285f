"""``dit-sparse batch``: a video for each prompt of a file."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..bundled import BUNDLED
from .options import (
    Block,
    DenseStepsOrProfile,
    Density,
    DensityRamp,
    Dtype,
    Engine,
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
    Seeds,
    Steps,
    VaeTiling,
    Width,
    Workers,
    call_arguments,
    count_or_fraction,
    density_ramp,
    method_text,
)
from .terminal import console, one_sentence, print_error, print_result, progress_bars


def batch(
    prompts: Annotated[Path, typer.Argument(help="A .txt, .csv or .jsonl file.")],
    out: OutFolder = Path("out/batch"),
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
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first clip of each prompt.")] = 0,
    seeds: Seeds = 1,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    guidance: Guidance = None,
    retries: Annotated[int, typer.Option(min=0, help="Further attempts for a clip that fails.")] = 1,
    dtype: Dtype = None,
    offload: Offload = None,
    vae_tiling: VaeTiling = False,
    fps: Fps = None,
    engine: Engine = "local",
    workers: Workers = None,
) -> None:
    """Generate a video for each prompt of a file. The same command resumes an interrupted batch. Under `accelerate
    launch` the processes share the clips; with --engine ray, the workers of a Ray cluster take them from a queue."""
    with one_sentence():
        from dit_sparse.generation.batch import Batch, Interrupted
        from dit_sparse.generation.loading import LoadOptions
        from dit_sparse.generation.prompts import read_rows
        from dit_sparse.generation.ray_batch import run_batch
        from dit_sparse.generation.ray_pool import check_engine

        check_engine(engine, workers)
        settings = {"method": method, "density": density, "dense_steps": count_or_fraction(dense_steps)}
        settings |= {"density_ramp": density_ramp(ramp), "executor": executor, "block": block, "guard": guard}
        settings["method"] = method_text(method, preset, profile)
        call = call_arguments(steps, frames, height, width, guidance, negative_prompt)
        load = LoadOptions(dtype, offload, vae_tiling)
        task = Batch(read_rows(prompts), out, model, settings, call, seed, seeds, retries, fps, load)
        try:
            with _progress_bars() as stage:
                manifest = task.run(stage) if engine == "local" else run_batch(task, stage, workers)
        except Interrupted:
            manifest = None
    if manifest is None:
        print_error("interrupted; run the same command again to resume")
        raise typer.Exit(130)
    print_result(manifest)
    counts = manifest["count"]
    summary = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
    console.print(f"{summary}; {escape(str(out / 'manifest.json'))}", soft_wrap=True)
    if counts["missing"]:
        console.print(
            "other processes generate the missing clips; run the same command again if they fail", soft_wrap=True
        )
    if counts["failed"]:
        failed = next(clip for clip in manifest["clips"] if clip["status"] == "failed")
        print_error(f"{failed['name']} failed: {failed['error']}")
        raise typer.Exit(1)


def _progress_bars() -> Any:
    """Only the first process of a launch shows progress, because all have about the same number of clips."""
    return nullcontext(lambda name: lambda done, steps: None) if int(os.environ.get("RANK", 0)) else progress_bars()
