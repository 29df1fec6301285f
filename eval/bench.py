"""Executors against torch's own attention, in one process, interleaved: ``python -m dit_sparse.eval.bench --out FILE``.

A speed is the ratio of two medians taken turn by turn in the same run; correctness is checked before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse import Grid, Site
from dit_sparse.kernels.pick import EXECUTORS, executor
from dit_sparse.methods import method

from .environment import conditions
from .files import save_json, writable_folder

GRID = Grid(16, 16, 32)
HEADS = 4


def rows(tokens: Grid, density: float, rounds: int, executors: Sequence[str]) -> Iterator[dict]:
    """One row for every executor that runs here, dtype, head_dim and block size."""
    for dtype, dim, block in product((torch.float32, torch.bfloat16), (64, 128), (128, 64)):
        q, k, v = torch.randn(3, 1, HEADS, tokens.tokens, dim).to(dtype).unbind(0)
        plan = method("random_blocks", density=density).plan(q, k, Site(tokens, block), {})
        exact = executor("gather").attend(q, k, v, plan)[0].float()
        for name in executors:
            if executor(name).why_not(q, k, plan):
                continue
            run = lambda name=name: executor(name).attend(q, k, v, plan)  # noqa: B023
            check(run()[0], exact)
            sparse, dense = interleaved(run, lambda: F.scaled_dot_product_attention(q, k, v), rounds)  # noqa: B023
            yield {
                "executor": name,
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": tokens.tokens,
                "heads": HEADS,
                "head_dim": dim,
                "block": block,
                "density": round(plan.density, 4),
                "seconds": sparse,
                "sdpa_seconds": dense,
                "speedup": dense / sparse,
            }


def check(out: Tensor, exact: Tensor) -> None:
    """Raises RuntimeError where an executor is wrong: nothing wrong is timed."""
    error = float((out.float() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt())
    if error > (1e-2 if out.dtype == torch.bfloat16 else 1e-4):
        raise RuntimeError(f"relative error {error:.2g}")


def interleaved(first: Callable, second: Callable, rounds: int) -> tuple[float, float]:
    """Median seconds of two functions that take turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, taken in zip((first, second), seconds, strict=True):
            begin = time.perf_counter()
            function()
            taken.append(time.perf_counter() - begin)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--executors", nargs="+", choices=EXECUTORS, default=[n for n in EXECUTORS if n != "reference"])
    options = parser.parse_args()
    writable_folder(options.out.parent)
    found = []
    with torch.no_grad():
        for row in rows(GRID, options.density, options.rounds, options.executors):
            shape = f"D {row['head_dim']:3} block {row['block']:3}"
            print(f"{row['executor']:8} {row['dtype']:9} {shape} {row['speedup']:.2f}x", flush=True)
            found.append(row)
    note = f"{HEADS} heads, random blocks, medians of {options.rounds} interleaved rounds"
    save_json(options.out, {"rows": found, "note": note} | conditions())


if __name__ == "__main__":
    main()
