"""``dit-sparse train``: the training of a gate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..bundled import BUNDLED
from .options import (
    Block,
    DenseSteps,
    Frames,
    Height,
    Model,
    Prompts,
    Steps,
    Width,
    call_arguments,
    count_or_fraction,
    read_prompts,
)
from .terminal import console, make_table, one_sentence, print_result, progress_bars


def train(
    gate: Annotated[str, typer.Argument(help="A gate, with settings as in 'seer(rank=4)'. See `dit-sparse methods`.")],
    model: Model = BUNDLED,
    prompts: Prompts = "8",
    held_out: Annotated[
        int | None,
        typer.Option(help="Last prompts that the gate is measured on and not trained on. Default: a quarter."),
    ] = None,
    iterations: Annotated[int, typer.Option(help="Steps of the optimizer.")] = 400,
    sampled_steps: Annotated[int, typer.Option(help="Denoising steps of each clip to learn from.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first clip and of the training.")] = 0,
    dense_steps: DenseSteps = "0.25",
    block: Block = None,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The weights to write.")] = Path("out/gate.safetensors"),
) -> None:
    """Train a gate on the attention of a model, and write its weights. The model does not change.

    The same command resumes an interrupted training. Use the weights as in 'seer(weights=out/gate.safetensors)'.
    """
    with one_sentence():
        from dit_sparse import Schedule
        from dit_sparse.training.train import GateTraining

        training = GateTraining(
            gate=gate,
            model=model,
            prompts=read_prompts(prompts),
            out=out,
            held_out=held_out,
            iterations=iterations,
            sampled_steps=sampled_steps,
            seed=seed,
            schedule=Schedule(dense_steps=count_or_fraction(dense_steps)),
            block=block,
            call=call_arguments(steps, frames, height, width, min_steps=2),
        )
        with progress_bars() as stage:
            result = training.run(stage)
    print_result(result | {"weights": str(out)})
    kept = result["kept_mass"]
    table = make_table("attention mass kept", *(f"density {density}" for density in kept["best"]))
    for name, label in (("untrained", "untrained"), ("trained", "trained"), ("best", "best blocks")):
        table.add_row(label, *(f"{value:.3f}" for value in kept[name].values()))
    console.print(table)
    console.print(f"on {result['held_out']} held-out prompts: {escape(str(out))}", soft_wrap=True)
