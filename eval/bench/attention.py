"""Benchmark of the attention executors against the fastest dense attention of the same process.

Timed functions take turns, so that a busy machine slows all of them alike; a speedup is the ratio of two medians. The
output of an executor is compared with the definition of attention before the executor is timed.
"""

from __future__ import annotations

import importlib
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
from dit_sparse.kernels.permute import permute_tokens
from dit_sparse.kernels.pick import why_not
from dit_sparse.kernels.planning.cluster import kmeans
from dit_sparse.methods import method

from .timing import interleaved_medians, peak_bytes, synchronize

PATTERNS = ("radial", "random_blocks", "clusters")
TIMED_EXECUTORS = tuple(name for name in EXECUTORS if name != "reference")
DENSE_BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
DENSE_PACKAGES = {"flash-attn-3": "flash_attn_interface", "flash-attn-4": "flash_attn.cute.interface"}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}  # relative error
CLUSTER_SIZES = 250, 100  # mean queries and keys in a cluster


@dataclass(frozen=True)
class Defaults:
    """Default problem sizes of a device; on two CPU cores they take about 2 minutes."""

    grids: tuple[Grid, ...]
    densities: tuple[float, ...]
    dtypes: tuple[torch.dtype, ...]
    heads: int


DEFAULTS = {
    "cuda": Defaults(
        grids=(Grid(16, 32, 32), Grid(21, 30, 52), Grid(21, 45, 80), Grid(33, 45, 80)),
        densities=(1.0, 0.5, 0.25, 0.1),
        dtypes=(torch.bfloat16,),
        heads=4,
    ),
    "cpu": Defaults((Grid(16, 16, 32),), (0.25, 0.1), (torch.float32, torch.bfloat16), heads=2),
}


@dataclass(frozen=True)
class Case:
    """One attention problem: random queries, keys and values with batch size 1, and a plan for them."""

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
        """Return q, k and v, ``[1, H, N, D]`` each. Seeds the global random generator."""
        torch.manual_seed(0)
        shape = (1, self.heads, self.grid.tokens, self.dim)
        return [torch.randn(shape, device=self.device).to(self.dtype) for _ in range(3)]

    def plan(self, q: Tensor, k: Tensor) -> Plan | ClusterPlan:
        """Return the plan of the case's pattern at its density."""
        if self.pattern == "clusters":
            return cluster_plan(q, k, self.density)
        return method(self.pattern, density=self.density).plan(q, k, None, Site(self.grid, self.block), {})

    def flops(self, density: float) -> float:
        """Return the floating-point operations of the two matrix products at a density."""
        return 4 * density * self.grid.tokens**2 * self.heads * self.dim

    def as_row(self) -> dict:
        """Return the case as plain values for JSON."""
        return {
            "grid": str(self.grid),
            "tokens": self.grid.tokens,
            "heads": self.heads,
            "head_dim": self.dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "pattern": self.pattern,
            "block": None if self.pattern == "clusters" else self.block,
            "density_asked": self.density,
        }


def cases(
    device: str,
    grids: Sequence[Grid] = (),
    dims: Sequence[int] = (64, 128),
    densities: Sequence[float] = (),
    patterns: Sequence[str] = PATTERNS,
    heads: int | None = None,
) -> list[Case]:
    """Return a case for every combination. Arguments that are empty or None take the defaults of the device.

    Raises:
        ValueError: a density is not in (0, 1].
    """
    defaults = DEFAULTS[device]
    densities = [Top(density).density for density in densities or defaults.densities]
    combinations = product(grids or defaults.grids, defaults.dtypes, dims, patterns, densities)
    return [
        Case(grid, heads or defaults.heads, dim, dtype, pattern, density, device)
        for grid, dtype, dim, pattern, density in combinations
    ]


def cluster_plan(q: Tensor, k: Tensor, density: float) -> ClusterPlan:
    """Return a plan that keeps, for each k-means cluster of queries, the key clusters with the best centroid scores."""
    (queries, query_means), (keys, key_means) = (
        kmeans(x, max(1, x.shape[2] // size)) for x, size in zip((q, k), CLUSTER_SIZES, strict=True)
    )
    return ClusterPlan.from_mask(Top(density).keep(query_means @ key_means.mT), queries, keys)


@torch.no_grad()
def measure_case(case: Case, executors: Sequence[str], seconds: float) -> Iterator[dict]:
    """Yield one row per executor: its measurements, or the reason why it cannot run the case.

    Args:
        case: the problem.
        executors: names of executors.
        seconds: about how long to measure in all.

    Raises:
        RuntimeError: the output of an executor is wrong.
    """
    q, k, v = case.tensors()
    plan, planning_seconds = _timed_plan(case, q, k)
    dense, runs = dense_attention(q, k, v), {}
    for name in executors:
        if reason := why_not(name, q, k, plan):
            yield case.as_row() | {"executor": name, "why_not": reason}
            continue
        runs[name] = partial(executor(name).attend, q, k, v, plan)
        check_output(name, runs[name]()[0], q, k, v, plan)
    reordering = {} if plan.order is None else {"permute": partial(permute_tokens, plan.order, k, v)}
    medians = interleaved_medians(dense | runs | reordering, seconds, case.device)
    fastest = min(dense, key=medians.get)
    for name, run in runs.items():
        yield case.as_row() | {
            "executor": name,
            "density": round(plan.density, 4),
            "seconds": medians[name],
            "dense": fastest,
            "dense_seconds": medians[fastest],
            "speedup": medians[fastest] / medians[name],
            "cost_per_block": medians[name] / (plan.density * medians[fastest]),
            "tflops": 1e-12 * case.flops(plan.density) / medians[name],
            "planning_seconds": planning_seconds,
            "permute_seconds": medians.get("permute", 0.0),
            "peak_bytes": peak_bytes(run, case.device),
        }


def _timed_plan(case: Case, q: Tensor, k: Tensor) -> tuple[Plan | ClusterPlan, float]:
    """Return the plan of a case and the seconds that making it takes, after a first call that compiles."""
    plan = case.plan(q, k)
    synchronize(case.device)
    begin = time.perf_counter()
    case.plan(q, k)
    synchronize(case.device)
    return plan, time.perf_counter() - begin


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable]:
    """Return the dense attention functions that run here: SDPA backends, and installed packages on a GPU."""
    sdpa = partial(F.scaled_dot_product_attention, q, k, v)
    if q.device.type != "cuda":
        return {"sdpa": sdpa}

    def with_backend(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa()

    functions: dict[str, Callable] = {}
    for name, backend in DENSE_BACKENDS.items():
        with suppress(RuntimeError):
            with_backend(backend)
            functions[name] = partial(with_backend, backend)
    for name, module in DENSE_PACKAGES.items():
        with suppress(ImportError):
            attend = importlib.import_module(module).flash_attn_func
            functions[name] = partial(attend, *(x.transpose(1, 2) for x in (q, k, v)))
    return functions or {"sdpa": sdpa}


def check_output(
    name: str, out: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: Plan | ClusterPlan, rows: int = 64
) -> None:
    """Compare evenly spaced rows of an output with the definition of attention.

    Raises:
        RuntimeError: the relative error exceeds the tolerance of the dtype.
    """
    queries = torch.linspace(0, q.shape[2] - 1, min(rows, q.shape[2]), device=q.device).round().long()
    scores = q[:, :, queries].float() @ k.float().mT * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~plan.token_mask(queries), -torch.inf)
    exact, out = scores.softmax(-1) @ v.float(), out[:, :, queries].float()
    error = float((out - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    if not error <= TOLERANCE[q.dtype]:
        raise RuntimeError(
            f"executor {name!r} is wrong on this device: relative error {error:.2g}, allowed {TOLERANCE[q.dtype]:.2g}"
        )
