"""``dit-sparse demo --three-d``: one sparse solid next to its dense one."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape

from .options import count_or_fraction, density_ramp
from .terminal import console, make_table, one_sentence, print_result, progress_bars, warn_if_busy


def demo_three_d(
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
        settings: texts of ``dense_steps`` and ``ramp``, ``executor`` and ``block``.
        call: arguments of the pipeline's call; None: the default.
    """
    with one_sentence():
        from dit_sparse import SparseAttnProcessor
        from dit_sparse.bundled import SOLID_PROMPT
        from dit_sparse.demo.three_d import SolidDemo

        processor = SparseAttnProcessor(
            method,
            density=density,
            dense_steps=count_or_fraction(settings["dense_steps"]),
            density_ramp=density_ramp(settings["ramp"]),
            executor=settings["executor"],
            block=settings["block"],
        )
        call = {name: value for name, value in call.items() if value is not None}
        task = SolidDemo(processor, out, SOLID_PROMPT if prompt is None else prompt, seed, call, model)
        with progress_bars() as stage:
            result = task.run(stage)
    print_result(result)
    warn_if_busy(result)
    _print_table(result)
    console.print(f"meshes, pictures, turntable and result.json: {escape(str(out))}", soft_wrap=True)


def _print_table(result: dict) -> None:
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
