"""Benchmark of `block_sparse` launch settings on this GPU: the tiling in use and its neighbours.

    python -m dit_sparse.eval.bench.tiling_sweep

A neighbour differs from the tiling in `kernels/gpu/architectures.py` in one setting, which may change the columns of
its tiles. All tilings of a case take turns. A neighbour that does not fit into the GPU, or whose output is wrong, is
reported as failed.
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

from .attention import Case, check_output
from .timing import first_line, interleaved_medians

GRIDS = (Grid(16, 32, 32), Grid(21, 45, 80))  # with blocks of 64 and of 128 tokens
DIMS = (64, 128)


def neighbours(tiling: Tiling, block: int) -> list[Tiling]:
    """Return every tiling that is one step away in one setting."""
    changes = [{"keys": keys} for keys in (tiling.keys // 2, 2 * tiling.keys) if 16 <= keys <= block]
    changes += [{"stages": stages} for stages in (tiling.stages - 1, tiling.stages + 1) if stages]
    changes += [{"warps": 12 - tiling.warps}] if tiling.warps in (4, 8) else []
    changes += [{"tma": False}] if tiling.tma else []
    return [replace(tiling, **change) for change in changes]


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, machine: Architecture, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """Run `block_sparse.attend` with a given tiling."""
    from dit_sparse.kernels.gpu.block_sparse import block_sparse_kernel

    architecture = replace(machine, tilings=dict.fromkeys(machine.tilings, tiling))
    arguments, out, lse = block_sparse.launch_arguments(q, k, v, plan, None, architecture)
    block_sparse_kernel[(len(arguments["schedule"]),)](**arguments)
    return out, lse


@torch.no_grad()
def measure_tilings(case: Case, seconds: float) -> Iterator[dict]:
    """Yield one row for the tiling in use and one for each neighbour.

    Args:
        case: the problem.
        seconds: about how long to measure in all.
    """
    q, k, v = case.tensors()
    plan, machine = case.plan(q, k), launching.device_architecture(q.device)
    current = machine.tiling(case.block, case.dim)
    runs, failures = {}, {}
    for tiling in (current, *neighbours(current, case.block)):
        run = partial(attend, q, k, v, plan, machine, tiling)
        try:
            check_output(str(tiling), run()[0], q, k, v, plan)
            runs[tiling] = run
        except Exception as error:  # Triton raises various types if a tiling cannot be compiled or launched
            failures[tiling] = first_line(error)
    medians = interleaved_medians(runs, seconds, case.device)
    for tiling in (*runs, *failures):
        row = {"tokens": case.grid.tokens, "head_dim": case.dim, "block": case.block, "usual": tiling == current}
        row |= {"density": round(plan.density, 4), "columns": tiling.tile_widths(case.block, case.dim)} | asdict(tiling)
        if tiling in failures:
            yield row | {"failed": failures[tiling]}
        else:
            speedup = medians[current] / medians[tiling] if current in medians else None
            tflops = 1e-12 * case.flops(plan.density) / medians[tiling]
            yield row | {"seconds": medians[tiling], "tflops": tflops, "speedup": speedup}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/tilings.json"), help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=20.0, help="measuring time per case")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "tiling_sweep requires a CUDA GPU, and torch finds none\n")
    try:
        writable_file(options.out)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    rows = []
    for grid, dim in product(GRIDS, DIMS):
        for row in measure_tilings(Case(grid, 8, dim, torch.bfloat16, "radial", 0.25, "cuda"), options.seconds):
            rows.append(row)
            print(_line(row), flush=True)
        save_json(options.out, {"rows": rows} | conditions("cuda"))


def _line(row: dict) -> str:
    outcome = row.get("failed") or f"{row['tflops']:6.1f} TFLOP/s"
    settings = ", ".join(f"{name} {row[name]}" for name in ("keys", "warps", "stages", "tma"))
    return f"{row['block']:4} x {row['head_dim']:3}  {settings}: {outcome}{'  (in use)' * row['usual']}"


if __name__ == "__main__":
    main()
