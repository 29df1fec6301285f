"""``dit-sparse methods``, ``show`` and ``doctor``: the methods, their masks, and the executors of this machine."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .options import Density, Kinds, method_list
from .terminal import console, make_table, one_sentence, print_result


def methods(
    names: Annotated[list[str] | None, typer.Argument(help="Methods to describe in detail. Default: list all.")] = None,
    kind: Kinds = None,
) -> None:
    """List the methods by kind, with their papers and what they need; or the settings of the named methods."""
    with one_sentence():
        from dit_sparse import METHODS
        from dit_sparse.eval.report.method_catalog import method_rows
        from dit_sparse.notation.presets import PRESETS
        from dit_sparse.notation.settings import alternatives_to

        rows = method_rows(method_list(kind or ""))
        for name in names or ():
            if name not in METHODS:
                raise ValueError(f"there is no method {name[:60]!r}; {alternatives_to(name, METHODS, METHODS)}")
    rows = [row for row in rows if not names or row["name"] in names]
    print_result(rows)
    if names:
        for row in rows:
            _print_details(row)
        return
    _print_list(rows)
    listed = ", ".join(f"{name} = {preset.method}" for name, preset in PRESETS.items())
    console.print(f"Presets: {listed}.", highlight=False)
    console.print(
        "`dit-sparse methods NAME` lists settings. Compose methods as in 'radial|sink', 'cached(svg2)' or "
        "'pooled(svg)', with settings as in 'radial(sink=true)'.",
        highlight=False,
    )


def _print_list(rows: list[dict]) -> None:
    """Print a table for each kind: name, summary and needs, paper."""
    from dit_sparse.eval.report.method_catalog import kind_summary, short_source

    name_width = max((len(row["name"]) for row in rows), default=0)
    for kind, group in groupby(rows, lambda row: row["kind"]):
        console.print(f"[bold]{kind_summary(kind)}[/]", highlight=False)
        table = Table(box=None, show_header=False, padding=(0, 0, 0, 2), expand=True)
        for options in ({"width": name_width}, {"ratio": 1}, {"width": 10, "overflow": "fold", "justify": "right"}):
            table.add_column(**options)
        for row in group:
            needed = f" (needs {', '.join(row['needs'])})" if row["needs"] else ""
            table.add_row(row["name"], escape(row["summary"] + needed), short_source(row))
        console.print(table, highlight=False)
        console.print()


def _print_details(row: dict) -> None:
    from dit_sparse.eval.report.method_catalog import setting_texts

    paper = ", ".join(filter(None, (row["paper"]["authors"], row["paper"]["title"], row["source"])))
    lines = [
        row["summary"],
        f"  paper     {paper}",
        f"  settings  {', '.join(setting_texts(row)) or '-'}",
        f"  needs     {', '.join(row['needs']) or '-'}",
        f"  file      {row['file']}",
    ]
    console.print(f"[bold]{row['name']}[/], a {row['kind']}", highlight=False)
    console.print("\n".join(lines) + "\n", highlight=False, markup=False, soft_wrap=True)


def presets() -> None:
    """List the presets, and the dense steps and layers that papers give for models."""
    with one_sentence():
        from dit_sparse.notation.presets import DEFAULT_PRESET, PRESETS

    print_result({"default": DEFAULT_PRESET} | {name: asdict(preset) for name, preset in PRESETS.items()})
    for name, preset in PRESETS.items():
        default = " (default)" if name == DEFAULT_PRESET else ""
        console.print(f"[bold]{name}[/]{default}: {preset.summary}", highlight=False)
        table = Table(box=None, show_header=False, padding=(0, 0, 0, 2), expand=True)
        table.add_column(width=max(map(len, preset.schedules)))
        table.add_column(ratio=1)
        table.add_row("method", preset.method)
        for transformer, of_paper in preset.schedules.items():
            settings = ", ".join(f"{field}={value}" for field, value in of_paper.schedule.items())
            table.add_row(transformer, f"{settings} ({of_paper.source})")
        console.print(table, highlight=False)
    console.print("Other models keep the first quarter of the steps dense. Use: --preset NAME, or enable(pipe, NAME).")


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
                f"{name_of(sparse_method)[:60]} plans from queries and keys, and `show` has none: "
                f"`dit-sparse demo` draws the mask of a generated video"
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
    resolved = sparse_method.resolve(token_grid, block)
    note = sparse_method.density_note(token_grid, block, plan.density)
    result = {"method": name_of(sparse_method), "resolved": name_of(resolved), "grid": str(token_grid), "block": block}
    result |= {"blocks": plan.blocks, "density": plan.density, "density_asked": sparse_method.density}
    print_result(result | {"density_note": note, "png": png and str(png)})
    console.print(terminal_map(plan), highlight=False, markup=False)
    lines = [
        *([] if resolved == sparse_method else [f"settings at this density: {name_of(resolved)}"]),
        *([f"density {sparse_method.density:g} requested: {note}"] if note else []),
        f"{name_of(sparse_method)}  {token_grid}  {plan.blocks} blocks of {block}  density {plan.density:.3f}",
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def doctor(
    quick: Annotated[bool, typer.Option(help="Skip executors that take long to compile.")] = False,
) -> None:
    """List which executors run on this machine, and why the others do not."""
    with one_sentence():
        from dit_sparse.eval.bench.executor_support import check_executors

        result = check_executors(compile_executors=not quick)
    print_result(result)
    console.print(f"device   {escape(result['device'])}", highlight=False)
    console.print("versions " + ", ".join(f"{name} {version or '-'}" for name, version in result["versions"].items()))
    table = make_table("executor", "status")
    for name, status in result["executors"].items():
        table.add_row(name, escape(status))
    console.print(table)
