"""What this machine can run, and why not the rest."""

from __future__ import annotations

import torch

from dit_sparse import ClusterPlan, Clusters, Grid, Site
from dit_sparse.kernels.pick import EXECUTORS, executor, why_not
from dit_sparse.methods import method

from .environment import conditions


def examine(compile_executors: bool = True) -> dict:
    """Conditions, and for every executor "ok" or the reason why not, found by running it on a small problem against
    the reference."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {name: _verdict(name, device, compile_executors) for name in EXECUTORS}
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if device == "cuda" else None
    return conditions() | {"cuda": torch.version.cuda, "gpu_memory_gib": memory, "executors": found}


def _verdict(name: str, device: str, compile_executors: bool) -> str:
    grid, block = Grid(3, 9, 11, after=7), 64
    dtype, tolerance = (torch.bfloat16, 5e-2) if device == "cuda" else (torch.float32, 1e-3)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, grid.tokens, 64, generator=generator).to(device, dtype).unbind(0)
    blocks = method("random_blocks", density=0.4).plan(q, k, Site(grid, block), {})
    sides = Clusters.of(blocks.query_group, blocks.blocks)
    plans = (blocks, ClusterPlan.of(blocks.keep(), sides, sides))
    plan = next((plan for plan in plans if why_not(name, q, k, plan) is None), None)
    if plan is None:
        return why_not(name, q, k, blocks)
    if name == "flex" and not compile_executors:
        return "not tried, for it compiles for a while"
    try:
        out, _ = executor(name).attend(q, k, v, plan)
        expected, _ = executor("reference").attend(q, k, v, plan)
    except Exception as error:
        return f"failed: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
    error = float((out - expected).abs().max())
    return "ok" if error < tolerance else f"wrong here: differs from the reference by {error:.2g}"
