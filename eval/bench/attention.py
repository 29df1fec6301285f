"""Attention measured: every executor at hand beside the best dense attention of the same process.

What is compared takes turns, so that a busy machine slows all of it alike; a speed is the ratio of two medians. Nothing
is timed before some of its rows agree with the definition.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_sparse import ClusterPlan, Grid, Plan, Site, Top
from dit_sparse.kernels.executors import EXECUTORS, executor
from dit_sparse.kernels.permute import permuted
from dit_sparse.kernels.pick import why_not
from dit_sparse.kernels.planning.cluster import kmeans
from dit_sparse.methods import method

PATTERNS = ("radial", "random_blocks", "clusters")
DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
PACKAGES = {"flash-attn-3": "flash_attn_interface", "flash-attn-4": "flash_attn.cute.interface"}  # dense as well
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
ROUNDS = (3, 50)  # the fewest and the most


@dataclass(frozen=True)
class Usual:
    """What is measured when nothing else is asked for: some 2 minutes on two cores."""

    grids: tuple[Grid, ...]
    densities: tuple[float, ...]
    dtypes: tuple[torch.dtype, ...]
    heads: int


USUAL = {
    "cuda": Usual(
        grids=(Grid(16, 32, 32), Grid(21, 30, 52), Grid(21, 45, 80), Grid(33, 45, 80)),
        densities=(1.0, 0.5, 0.25, 0.1),
        dtypes=(torch.bfloat16,),
        heads=4,
    ),
    "cpu": Usual((Grid(16, 16, 32),), (0.25, 0.1), (torch.float32, torch.bfloat16), heads=2),
}


@dataclass(frozen=True)
class Case:
    """One problem: random queries, keys and values of one item, and a plan for them."""

    grid: Grid
    heads: int
    dim: int
    dtype: torch.dtype
    pattern: str
    density: float
    device: str

    @property
    def block(self) -> int:
        return 64 if self.grid.tokens < 32_768 else 128

    def tensors(self) -> list[Tensor]:
        torch.manual_seed(0)  # of the process, which a bench has to itself
        shape = (1, self.heads, self.grid.tokens, self.dim)
        return [torch.randn(shape, device=self.device).to(self.dtype) for _ in range(3)]

    def plan(self, q: Tensor, k: Tensor) -> Plan | ClusterPlan:
        if self.pattern == "clusters":
            return clustered(q, k, self.density)
        return method(self.pattern, density=self.density).plan(q, k, Site(self.grid, self.block), {})


def cases(
    device: str,
    grids: Sequence[Grid] = (),
    dims: Sequence[int] = (64, 128),
    densities: Sequence[float] = (),
    patterns: Sequence[str] = PATTERNS,
    heads: int | None = None,
) -> list[Case]:
    """Every combination; what is empty or None is as usual on the device. Raises ValueError for a density out of
    range."""
    usual = USUAL[device]
    densities = [Top(density).density for density in densities or usual.densities]
    return [
        Case(grid, heads or usual.heads, dim, dtype, pattern, density, device)
        for grid, dtype, dim, pattern, density in product(grids or usual.grids, usual.dtypes, dims, patterns, densities)
    ]


def clustered(q: Tensor, k: Tensor, density: float) -> ClusterPlan:
    """The best key clusters of each query cluster by the product of their centroids; some 250 queries and 100 keys in
    each on average."""
    (queries, query_means), (keys, key_means) = (
        kmeans(x, max(1, x.shape[2] // size)) for x, size in ((q, 250), (k, 100))
    )
    return ClusterPlan.from_mask(Top(density).keep(query_means @ key_means.mT), queries, keys)


@torch.no_grad()
def measured(case: Case, executors: Sequence[str], seconds: float) -> Iterator[dict]:
    """One row for every executor that runs this case, and one for every other, which says why not.

    Raises:
        RuntimeError: an executor is wrong.
    """
    q, k, v = case.tensors()
    plan = case.plan(q, k)  # compiles what has to be compiled
    _finish(case.device)
    started = time.perf_counter()
    case.plan(q, k)
    _finish(case.device)
    planning = time.perf_counter() - started
    dense = dense_attention(q, k, v)
    runs, rows = {}, []
    for name in executors:
        if reason := why_not(name, q, k, plan):
            yield _told(case) | {"executor": name, "why_not": reason}
            continue
        runs[name] = partial(executor(name).attend, q, k, v, plan)
        check(name, runs[name]()[0], q, k, v, plan)
    moves = {} if plan.order is None else {"permute": partial(permuted, plan.order, k, v)}
    medians = by_turns(dense | runs | moves, seconds, case.device)
    best = min(dense, key=medians.get)
    for name in runs:
        rows.append(
            _told(case)
            | {
                "executor": name,
                "density": round(plan.density, 4),
                "seconds": medians[name],
                "dense": best,
                "dense_seconds": medians[best],
                "speedup": medians[best] / medians[name],
                "cost_per_block": medians[name] / (plan.density * medians[best]),
                "tflops": 4e-12 * plan.density * case.grid.tokens**2 * case.heads * case.dim / medians[name],
                "planning_seconds": planning,
                "permute_seconds": medians.get("permute", 0.0),
                "peak_bytes": _peak_bytes(runs[name], case.device),
            }
        )
    yield from rows


def _told(case: Case) -> dict:
    return {
        "grid": str(case.grid),
        "tokens": case.grid.tokens,
        "heads": case.heads,
        "head_dim": case.dim,
        "dtype": str(case.dtype).removeprefix("torch."),
        "pattern": case.pattern,
        "block": None if case.pattern == "clusters" else case.block,
        "density_asked": case.density,
    }


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable]:
    """Torch's own attention in every way that runs here, and that of packages which are installed."""
    plain = partial(F.scaled_dot_product_attention, q, k, v)
    if q.device.type != "cuda":
        return {"sdpa": plain}

    def by(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return plain()

    found = {}
    for name, backend in DENSE.items():
        try:
            by(backend)
        except RuntimeError:
            continue
        found[name] = partial(by, backend)
    for name, module in PACKAGES.items():
        with suppress(ImportError):
            attend = importlib.import_module(module).flash_attn_func
            found[name] = partial(attend, *(x.transpose(1, 2) for x in (q, k, v)))
    return found or {"sdpa": plain}


def check(name: str, out: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: Plan | ClusterPlan, rows: int = 64) -> None:
    """Compare some rows with the definition. Raises RuntimeError where the executor is wrong."""
    measured_steps = torch.linspace(0, q.shape[2] - 1, min(rows, q.shape[2]), device=q.device).round().long()
    scores = q[:, :, measured_steps].float() @ k.float().mT * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~plan.token_mask(measured_steps), -torch.inf)
    exact, out = scores.softmax(-1) @ v.float(), out[:, :, measured_steps].float()
    error = float((out - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    if not error <= TOLERANCE[q.dtype]:
        raise RuntimeError(f"the executor {name!r} is wrong here: relative error {error:.2g}")


def by_turns(functions: dict[str, Callable], seconds: float, device: str) -> dict[str, float]:
    """Median seconds of functions that take turns, for about as long as that in all."""
    for function in functions.values():
        function()
    taken = {name: [] for name in functions}
    end, (fewest, most) = time.perf_counter() + seconds, ROUNDS
    for turn in range(most):
        if turn >= fewest and time.perf_counter() > end:
            break
        for name, function in functions.items():
            taken[name].append(seconds_of(function, device))
    return {name: statistics.median(values) for name, values in taken.items()}


def seconds_of(function: Callable, device: str) -> float:
    if device != "cuda":
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak_bytes(function: Callable, device: str) -> int | None:
    """What a call needs beyond what lies in memory before it; unknown on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def every_executor() -> tuple[str, ...]:
    """All but the specification, which is not made to be fast."""
    return tuple(name for name in EXECUTORS if name != "reference")
