"""Costs of the pooled tail and of the scores of `routed`, as shares of a dense attention call of the same process.

All functions take turns. A share is the median of the ratios within each round, so that a busy machine, which slows a
whole round, has little effect.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse import ClusterPlan, Clusters, Plan
from dit_sparse.kernels.pick import pick
from dit_sparse.kernels.planning.pooling_error import mass_and_spread, pooling_error
from dit_sparse.plan import num_blocks

from .timing import interleaved_durations

TAILS = (16, 32)
KEY_TILES = (64, 32, 16)  # with blocks of 64 queries
QUERY_STRIDES = (8, 16)
CALLS_PER_PLAN = 4  # two branches of guidance and a new plan every second step


@dataclass(frozen=True)
class Problem:
    """A self-attention call of random queries, keys and values in float32 on a CPU, bfloat16 on a GPU."""

    tokens: int = 8192
    heads: int = 2
    dim: int = 64
    density: float = 0.25
    block: int = 64

    def tensors(self, device: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        shape = (3, 1, self.heads, self.tokens, self.dim)
        return list(torch.randn(shape, generator=generator).to(device, dtype))

    def plan(self, key_tile: int, device: str) -> Plan | ClusterPlan:
        """Return a plan that keeps random key tiles in every row, of equal blocks if the tiles are blocks."""
        generator = torch.Generator().manual_seed(1)
        rows, columns = (num_blocks(self.tokens, size) for size in (self.block, key_tile))
        scores = torch.rand(1, self.heads, rows, columns, generator=generator)
        kept = scores.topk(max(1, round(self.density * columns)), -1).indices
        keep = torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, kept, True)
        if key_tile == self.block:
            return Plan.from_mask(keep, self.tokens, self.block).to(device)
        order = torch.arange(self.tokens)[None, None]
        edges = lambda size: torch.tensor([*range(0, self.tokens, size), self.tokens], dtype=torch.int32)[None, None]
        sides = (Clusters(order, edges(size)) for size in (self.block, key_tile))
        return ClusterPlan.from_mask(keep, *sides).to(device)


def _tails_of(key_tile: int) -> list[int]:
    """Return the tails to measure for a key tile; larger ones are equivalent, because a term has tokens of one tile
    only."""
    return [tail for tail in TAILS if tail <= key_tile]


@torch.no_grad()
def measure(problem: Problem, threads: Sequence[int], seconds: float, device: str = "cpu") -> Iterator[dict]:
    """Yield a row for every plan and tail, and one for every score.

    Args:
        problem: the call.
        threads: numbers of CPU threads to measure with.
        seconds: about how long to measure in all.
        device: "cpu" or "cuda".
    """
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            for row in _measure_with_threads(problem, seconds / len(threads), device):
                yield asdict(problem) | {"threads": count} | row
    finally:
        torch.set_num_threads(before)


def _measure_with_threads(problem: Problem, seconds: float, device: str) -> Iterator[dict]:
    q, k, v = problem.tensors(device)
    plans = {size: problem.plan(size, device) for size in KEY_TILES}
    executors = {size: pick("auto", q, k, plan) for size, plan in plans.items()}
    functions = {"dense": partial(F.scaled_dot_product_attention, q, k, v)}
    for size, plan in plans.items():
        attend = executors[size].executor.attend
        tails = [None, *_tails_of(size)]
        functions |= {(size, tail): partial(attend, q, k, v, plan.with_tail(tail)) for tail in tails}
    for size in TAILS:
        functions["mass_and_spread", size] = partial(mass_and_spread, q, k, problem.block, size)
    for every in QUERY_STRIDES:
        functions["pooling_error", every] = partial(pooling_error, q, k, problem.block, TAILS[0], every)
    durations = interleaved_durations(functions, seconds, device)
    dense = durations.pop("dense")
    share = lambda name: statistics.median(one / other for one, other in zip(durations[name], dense, strict=True))
    rounds = {"rounds": len(dense), "dense_seconds": statistics.median(dense)}
    for size, plan in plans.items():
        for tail in _tails_of(size):
            pairs = zip(durations[size, tail], durations[size, None], dense, strict=True)
            yield rounds | {
                "part": "tail",
                "executor": executors[size].name,
                "key_tile": size,
                "tail": tail,
                "kept_share": share((size, None)),
                "share": statistics.median((one - other) / whole for one, other, whole in pairs),
                "arithmetic": plan.with_tail(tail).tail_density,
            }
    for part, size in durations:
        if isinstance(part, str):
            total = share((part, size))
            name = "every" if part == "pooling_error" else "key_tile"
            yield rounds | {"part": part, name: size, "share": total, "share_per_call": total / CALLS_PER_PLAN}
