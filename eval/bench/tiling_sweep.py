"""Time neighbouring launch settings of `block_sparse` on this GPU: ``python -m dit_sparse.eval.bench.tiling_sweep``.

Every neighbour differs from the row of `kernels/architectures.py` in one setting, and by it perhaps in the columns of
its tiles. They take turns with it; a neighbour that does not fit into the GPU, or is wrong there, says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from dit_sparse import Grid, Plan
from dit_sparse.kernels.executors import block_sparse
from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.gpu.architectures import Architecture, Tiling
from dit_sparse.output.environment import conditions
from dit_sparse.output.files import save_json, writable_file

from .attention import Case, by_turns, check

GRIDS = (Grid(16, 32, 32), Grid(21, 45, 80))  # in blocks of 64 and of 128
DIMS = (64, 128)


def neighbours(tiling: Tiling, block: int) -> list[Tiling]:
    """Every tiling that is a step away in one setting."""
    changes = [{"keys": keys} for keys in (tiling.keys // 2, 2 * tiling.keys) if 16 <= keys <= block]
    changes += [{"stages": stages} for stages in (tiling.stages - 1, tiling.stages + 1) if stages]
    changes += [{"warps": 12 - tiling.warps}] if tiling.warps in (4, 8) else []
    changes += [{"tma": False}] if tiling.tma else []
    return [replace(tiling, **change) for change in changes]


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, machine: Architecture, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """`block_sparse.attend` with a tiling of one's own."""
    from dit_sparse.kernels.gpu.block_sparse import forward

    only = replace(machine, tilings=dict.fromkeys(machine.tilings, tiling))
    arguments, out, lse = block_sparse.launch(q, k, v, plan, None, only)
    forward[(len(arguments["schedule"]),)](**arguments)
    return out, lse


@torch.no_grad()
def measured(case: Case, seconds: float) -> Iterator[dict]:
    """One row for the tiling of the table, the first, and one for each of its neighbours."""
    q, k, v = case.tensors()
    plan, machine = case.plan(q, k), launching.machine(q.device)
    usual = machine.tiling(case.block, case.dim)
    runs, failures = {}, {}
    for tiling in (usual, *neighbours(usual, case.block)):
        run = partial(attend, q, k, v, plan, machine, tiling)
        try:
            check(str(tiling), run()[0], q, k, v, plan)
            runs[tiling] = run
        except Exception as error:  # that a neighbour cannot be compiled or launched is what we want to know
            failures[tiling] = (str(error).strip() or type(error).__name__).splitlines()[0]
    medians = by_turns(runs, seconds, case.device)
    for tiling in (*runs, *failures):
        row = {"tokens": case.grid.tokens, "head_dim": case.dim, "block": case.block, "usual": tiling == usual}
        row |= {"density": round(plan.density, 4), "columns": tiling.columns(case.block, case.dim)} | asdict(tiling)
        if tiling in failures:
            yield row | {"failed": failures[tiling]}
        else:
            flops = 4 * plan.density * case.grid.tokens**2 * case.heads * case.dim
            of_usual = medians[usual] / medians[tiling] if usual in medians else None
            yield row | {"seconds": medians[tiling], "tflops": flops / medians[tiling] / 1e12, "speedup": of_usual}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/tilings.json"))
    parser.add_argument("--seconds", type=float, default=20.0, help="to measure every shape")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "there is no NVIDIA GPU here that torch can use: nothing was run\n")
    try:
        writable_file(options.out)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    rows = []
    for grid, dim in product(GRIDS, DIMS):
        for row in measured(Case(grid, 8, dim, torch.bfloat16, "radial", 0.25, "cuda"), options.seconds):
            rows.append(row)
            told = row.get("failed") or f"{row['tflops']:6.1f} TFLOP/s"
            settings = ", ".join(f"{name} {row[name]}" for name in ("keys", "warps", "stages", "tma"))
            print(f"{row['block']:4} x {dim:3}  {settings}: {told}{'  (the table)' * row['usual']}", flush=True)
        save_json(options.out, {"rows": rows} | conditions("cuda"))


if __name__ == "__main__":
    main()
