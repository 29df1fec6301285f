"""``dit-sparse methods``, ``show`` and ``doctor``: the methods, their masks, and the executors of this machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .options import Density, JsonFlag
from .terminal import console, make_table, one_sentence


def methods(json_out: JsonFlag = False) -> None:
    """List the methods, their settings with defaults, and their papers."""
    from dit_sparse.eval.report.readme import method_rows, setting_texts
    from dit_sparse.notation.presets import PRESETS

    rows = method_rows()
    if json_out:
        print(json.dumps(rows, indent=2))
        return
    table = make_table("method", "keeps", "settings")
    table.add_column("paper", overflow="fold")
    for row in rows:
        settings = ", ".join(setting_texts(row))
        table.add_row(row["name"], row["summary"], settings, re.sub("https://(arxiv.org/abs/)?", "", row["source"]))
    console.print(table)
    presets = ", ".join(f"{name} = {text}" for name, text in PRESETS.items())
    console.print(f"Presets: {presets}.", highlight=False)
    console.print(
        "Compose them as in 'radial|sink', 'cached(svg2)' or 'pooled(svg)', with settings as in 'radial(sink=true)'.",
        highlight=False,
    )


def show(
    method: Annotated[
        str, typer.Argument(help="A static method, such as radial, 'radial(sink=true)' or 'radial|sink'.")
    ],
    grid: Annotated[
        str, typer.Option(help="Token grid, frames x height x width, with text before or after it: 226+13x30x45.")
    ] = "21x20x20",
    density: Density = None,
    block: Annotated[int, typer.Option(help="Tokens in a block.")] = 128,
    png: Annotated[Path | None, typer.Option(help="Also draw the mask to this file.")] = None,
) -> None:
    """Draw the mask of a static method on a token grid."""
    with one_sentence():
        import torch

        from dit_sparse import Grid, Plan, Site, SparseAttnProcessor
        from dit_sparse.methods import name_of
        from dit_sparse.output.files import save_figure, writable_figure
        from dit_sparse.plotting.masks import plot_plan, terminal_map

        token_grid = Grid.parse(grid)
        sparse_method = SparseAttnProcessor(method, density=density).settings.method
        if not sparse_method.static:
            raise ValueError(
                f"{name_of(sparse_method)[:60]} plans from queries and keys: `show` draws static methods only"
            )
        if not 16 <= block <= 256:
            raise ValueError(f"block must be in [16, 256], got {block}")
        if png:
            writable_figure(png, "--png")
        unused = torch.zeros(1, 1, token_grid.tokens, 8)  # static methods read the shape only
        planned = sparse_method.plan(unused, unused, None, Site(token_grid, block), {})
        plan = planned or Plan.dense(token_grid.tokens, block)
        if png:
            save_figure(png, plot_plan(plan, token_grid, name_of(sparse_method)))
    console.print(terminal_map(plan), highlight=False, markup=False)
    resolved = sparse_method.resolve(token_grid, block)
    note = sparse_method.density_note(token_grid, block, plan.density)
    lines = [
        *([] if resolved == sparse_method else [f"settings at this density: {name_of(resolved)}"]),
        *([f"density {sparse_method.density:g} requested: {note}"] if note else []),
        f"{name_of(sparse_method)}  {token_grid}  {plan.blocks} blocks of {block}  density {plan.density:.3f}",
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def doctor(
    json_out: JsonFlag = False,
    quick: Annotated[bool, typer.Option(help="Skip executors that take long to compile.")] = False,
) -> None:
    """List which executors run on this machine, and why the others do not."""
    with one_sentence():
        from dit_sparse.eval.bench.executor_support import check_executors

        result = check_executors(compile_executors=not quick)
    if json_out:
        print(json.dumps(result, indent=2))
        return
    console.print(f"device   {escape(result['device'])}", highlight=False)
    console.print("versions " + ", ".join(f"{name} {version or '-'}" for name, version in result["versions"].items()))
    table = make_table("executor", "status")
    for name, status in result["executors"].items():
        table.add_row(name, escape(status))
    console.print(table)
