"""What this machine can run, and why not the rest."""

from __future__ import annotations

import torch

from dit_sparse import ClusterPlan, Clusters, Grid, Plan
from dit_sparse.kernels.calibration import CallSignature, self_check
from dit_sparse.kernels.executors import EXECUTORS, executor
from dit_sparse.kernels.pick import why_not
from dit_sparse.output.environment import conditions


def examine(compile_executors: bool = True) -> dict:
    """Conditions, and for every executor "ok" or the reason why not, found by running it on a small problem against
    the reference."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {name: _self_check(name, device, compile_executors) for name in EXECUTORS}
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if device == "cuda" else None
    return conditions() | {"cuda": torch.version.cuda, "gpu_memory_gib": memory, "executors": found}


def _self_check(name: str, device: str, compile_executors: bool) -> str:
    grid, dtype = Grid(3, 9, 11, after=7), torch.bfloat16 if device == "cuda" else torch.float32
    q = torch.zeros(1, 2, grid.tokens, 64, dtype=dtype, device=device)
    blocks = Plan.dense(grid.tokens, 128, device)
    if name == "flex" and not compile_executors:
        return executor(name).why_not(q, q, blocks) or "not tried, for it compiles for a while"
    sides = Clusters.from_labels(blocks.query_group, blocks.blocks)
    plans = (blocks, ClusterPlan.from_mask(blocks.block_mask(), sides, sides))
    plan = next((plan for plan in plans if why_not(name, q, q, plan) is None), None)
    if plan is None:
        return why_not(name, q, q, blocks)
    return self_check(name, CallSignature.from_call(q, plan)) or "ok"
