"""``dit-sparse study``: the error of single denoising steps, and what each part of a method contributes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..bundled import BUNDLED
from .options import (
    Block,
    DenseSteps,
    Densities,
    Engine,
    Executor,
    Frames,
    Height,
    Model,
    OutFolder,
    Prompts,
    Seeds,
    Steps,
    Width,
    Workers,
    call_arguments,
    count_or_fraction,
    method_list,
    numbers,
    read_prompts,
)
from .terminal import console, decimals, make_table, one_sentence, print_result, progress_bars


def study(
    methods: Annotated[
        str, typer.Option(help="Rows, separated by commas, as for `dit-sparse compare`.")
    ] = "svg2,pooled(svg2),routed",
    ablate: Annotated[
        str | None,
        typer.Option(
            help="Method to ablate: each setting that can be switched off is left out once, and used alone once."
        ),
    ] = None,
    clips: Annotated[bool, typer.Option("--clips", help="Also compare whole clips, which takes much longer.")] = False,
    density: Densities = "0.25",
    prompts: Prompts = "3",
    seeds: Seeds = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first clip of each prompt.")] = 0,
    model: Model = BUNDLED,
    dense_steps: DenseSteps = "0.25",
    executor: Executor = "auto",
    block: Block = None,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    engine: Engine = "local",
    workers: Workers = None,
    out: OutFolder = Path("out/study"),
) -> None:
    """Measure the error of the guided prediction in single steps, for methods and the parts of a method.

    Every step starts from the latents of the dense clip, so a few clips suffice to rank methods. The same command
    resumes an interrupted study.
    """
    with one_sentence():
        from dit_sparse import Schedule
        from dit_sparse.eval.comparison.ray_runner import runner_class
        from dit_sparse.eval.study.study import Study

        make_runner = runner_class(engine, workers)
        task = Study.create(
            method_list(methods),
            ablate,
            clips,
            prompts=read_prompts(prompts),
            densities=numbers(density),
            seeds=seeds,
            first_seed=seed,
            out=out,
            schedule=Schedule(dense_steps=count_or_fraction(dense_steps)),
            executor=executor,
            block=block,
            model=model,
            call=call_arguments(steps, frames, height, width, min_steps=2),
        )
        with progress_bars() as stage:
            result = task.run(stage, make_runner)
    print_result(result)
    table = make_table("row", "error of a step", "density", "with pooled terms", "PSNR (dB)")
    for row in result["rows"]:
        cost = row["density_achieved"] + row["tail_density"]
        figures = decimals(row["error"], 4), decimals(row["density_achieved"], 3), decimals(cost, 3)
        table.add_row(escape(row["name"]), *figures, decimals(row["psnr"], 1))
    console.print(table)
    console.print(f"{len(result['prompts'])} prompts, {result['device']}; {escape(str(out / 'study.md'))}")
