"""Measure every tiny model, for the table of docs/models.md.

``python tests/helpers/measure_families.py`` writes ``eval/results/cpu/families.json``; then
``python -m dit_sparse.eval.report.readme`` fills the table.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch._dynamo
from torch._dynamo.exc import UserError

import dit_sparse as ds
from dit_sparse.output.environment import conditions
from dit_sparse.output.files import save_json
from tiny_models import Call, TinyModel, compile_blocks, first_output, tiny_models

TARGET = Path(__file__).parents[2] / "eval" / "results" / "cpu" / "families.json"
SETTINGS = dict(method="random_blocks", dense_steps=0, min_tokens=0, block=16, executor="reference")


def measure(tiny: TinyModel) -> dict:
    """Return the results of one class.

    Returns:
        ``difference``: largest difference from the stock output at density 1, relative to its largest value;
        ``dense_equal``: whether ``dense`` gives the stock output bit for bit; ``density``: achieved for 0.5;
        ``compiles``: whether the sparse blocks compile with ``fullgraph=True`` and give the same result.
    """
    model, call = tiny.build(), Call(tiny.grids[0])
    compute = lambda: first_output(model(**tiny.arguments(call), return_dict=False))
    stock = compute()
    with ds.enable(model, density=1.0, **SETTINGS):
        difference = (compute() - stock).abs().max() / stock.abs().max()
    with ds.enable(model, **SETTINGS | dict(method="dense")):
        dense_equal = compute().equal(stock)
    with ds.enable(model, density=0.5, **SETTINGS) as run:
        half = compute()
    torch._dynamo.reset()
    compile_blocks(model)
    with ds.enable(model, density=0.5, **SETTINGS):
        try:
            compiles = torch.allclose(compute(), half, rtol=1e-5, atol=1e-5)
        except UserError:
            compiles = False
    return {
        "transformer": tiny.name,
        "sites": tiny.sites,
        "grid": run.report().grids[-1],
        "difference": float(difference),
        "dense_equal": dense_equal,
        "density": run.report().density_achieved,
        "compiles": compiles,
    }


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    rows = [measure(tiny) for tiny in tiny_models().values()]
    save_json(TARGET, {**conditions("cpu"), "settings": SETTINGS, "rows": rows})
