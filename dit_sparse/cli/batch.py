"""``dit-sparse batch``: many prompts overnight."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .measure import Block, DenseSteps, Frames, Model, Side, Steps, count_or_fraction, given
from .terminal import complaints, console, one_sentence, progress_bars


def batch(
    prompts: Annotated[Path, typer.Argument(help="A .txt, .csv or .jsonl file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the videos and manifest.json.")] = Path(
        "out/batch"
    ),
    model: Model = "shapes-wan",
    method: Annotated[str, typer.Option("--method", "-m", help="One of `dit-sparse methods`.")] = "radial",
    density: Annotated[float, typer.Option("--density", "-d", help="Fraction of the pairs to compute.")] = 0.25,
    dense_steps: DenseSteps = "0.25",
    executor: Annotated[str, typer.Option(help="auto, or an executor of `dit-sparse doctor`.")] = "auto",
    block: Block = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first clip of a prompt.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Clips of each prompt.")] = 1,
    steps: Steps = None,
    frames: Frames = None,
    height: Side = None,
    width: Side = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale.")] = None,
    retries: Annotated[int, typer.Option(min=0, help="How often a clip that failed is tried again.")] = 1,
    fps: Annotated[int | None, typer.Option(min=1, help="Frames per second of the files.")] = None,
) -> None:
    """Make a video of every prompt. Killed and called again, it goes on where it was; so do many processes under
    `accelerate launch`."""
    with one_sentence():
        from dit_sparse.generation.batch import Batch, Stopped
        from dit_sparse.generation.prompts import read_rows

        size = given(num_inference_steps=steps, num_frames=frames, height=height, width=width, guidance_scale=guidance)
        usual = {"method": method, "density": density, "dense_steps": count_or_fraction(dense_steps)}
        usual |= {"executor": executor, "block": block}
        task = Batch(read_rows(prompts), out, model, usual, size, seed, seeds, retries, fps)
        try:
            with _bars() as stage:
                manifest = task.run(stage)
        except Stopped:
            manifest = None
    if manifest is None:
        complaints.print("dit-sparse: stopped; the same command goes on from here")
        raise typer.Exit(130)
    count = manifest["count"]
    told = ", ".join(f"{number} {status}" for status, number in count.items() if number)
    console.print(f"{told}; {escape(str(out / 'manifest.json'))}")
    if count["missing"]:
        console.print(
            "what is missing is with the other processes; the same command makes what they leave", soft_wrap=True
        )
    if count["failed"]:
        first = next(clip for clip in manifest["clips"] if clip["status"] == "failed")
        complaints.print(f"dit-sparse: {first['name']} failed: {first['error']}", markup=False, soft_wrap=True)
        raise typer.Exit(1)


def _bars():
    """Of many processes the first shows how far it is; their shares are alike."""
    return nullcontext(lambda name: lambda done, steps: None) if int(os.environ.get("RANK", 0)) else progress_bars()
