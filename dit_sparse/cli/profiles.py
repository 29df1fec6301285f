"""``dit-sparse profile``: the search for a head profile, and the check of one."""

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
    Prompts,
    Steps,
    Width,
    call_arguments,
    count_or_fraction,
    numbers,
    read_prompts,
)
from .terminal import console, one_sentence, print_result, progress_bars

MAX_DRIFT = 1.25  # times the stored error; above it, a profile does not fit any more


def profile(
    model: Annotated[str, typer.Argument(help=f"{BUNDLED}, a local diffusers folder, or a name on the hub.")],
    prompts: Prompts = "2",
    candidates: Annotated[
        str,
        typer.Option(help="Methods to try for every head, separated by commas; vdit: its four modes, moa: its spans."),
    ] = "svg.spatial,svg.temporal,radial,vdit.vertical,subblock,xattention,asa,sparge",
    target_density: Annotated[float | None, typer.Option(help="Mean density of the heads. Default: 0.25.")] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Instead of a density: largest root mean square of the heads' relative errors.")
    ] = None,
    spread: Annotated[
        str | None,
        typer.Option(help="Densities to try, as multiples of the target: 0.5,1,2. Default: one density for all heads."),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="Numbers of frames to measure at: 9,21. The density is met at each. Default: --frames."),
    ] = None,
    dense_steps: DenseSteps = "0.25",
    block: Block = None,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    check: Annotated[
        Path | None, typer.Option(help="Measure this profile and compare with its stored error, instead of searching.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The profile to write.")] = Path("out/profile.json"),
) -> None:
    """Search for the best method for each head of a model, and write a profile."""
    with one_sentence():
        from dit_sparse import Profile, Schedule
        from dit_sparse.profiling.search import ProfileSearch, compare_with_stored_error

        call = call_arguments(steps, frames, height, width, min_steps=2)
        if check is not None:
            stored = Profile.load(check)
            with progress_bars() as stage:
                before, now = compare_with_stored_error(stored, model, read_prompts(prompts), call, stage)
            advice = "the profile fits" if now <= MAX_DRIFT * before else "search again with these prompts and sizes"
            print_result({"error": now, "stored_error": before, "fits": now <= MAX_DRIFT * before})
            console.print(f"relative error {now:.3f}, stored {before:.3f}: {advice}")
            return
        if target_density is None and max_error is None:
            target_density = 0.25
        search = ProfileSearch(
            model=model,
            prompts=read_prompts(prompts),
            candidates=candidates,
            out=out,
            target_density=target_density,
            max_error=max_error,
            spread=numbers(spread, "--spread") if spread else None,
            schedule=Schedule(dense_steps=count_or_fraction(dense_steps)),
            block=block,
            call=call,
            lengths=[int(n) if n.is_integer() else n for n in numbers(lengths or "", "--lengths")],
        )
        with progress_bars() as stage:
            result = search.run(stage)
    print_result(result.model_dump(mode="json", by_alias=True))
    for letter, entry in result.methods.items():
        settings = ", ".join(f"{name}={value}" for name, value in entry.settings.items())
        console.print(f"  {letter}  {entry.method} {settings}", highlight=False, markup=False)
    console.print("  " + " ".join(result.layers), markup=False)
    measured = result.measured
    console.print(
        f"density {measured['density']}, relative error {measured['error']}: {escape(str(out))} and its .png",
        soft_wrap=True,
    )
