"""Which executors run on this machine, and why the others do not: the results of ``dit-sparse doctor``."""

from __future__ import annotations

import torch

from dit_sparse import ClusterPlan, Clusters, Grid, Plan
from dit_sparse.kernels.calibration import CallSignature, self_check
from dit_sparse.kernels.executors import EXECUTORS, executor
from dit_sparse.kernels.pick import why_not
from dit_sparse.output.environment import conditions


def check_executors(compile_executors: bool = True) -> dict:
    """Return the conditions, and for every executor ``"ok"`` or the reason why it does not run.

    Args:
        compile_executors: also check executors that compile for a while, by running them.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    support = {name: _check_executor(name, device, compile_executors) for name in EXECUTORS}
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if device == "cuda" else None
    return conditions() | {"cuda": torch.version.cuda, "gpu_memory_gib": memory, "executors": support}


def _check_executor(name: str, device: str, compile_executors: bool) -> str:
    """Compare an executor with the reference on a small problem, by a block plan or else a cluster plan."""
    grid, dtype = Grid(3, 9, 11, after=7), torch.bfloat16 if device == "cuda" else torch.float32
    q = torch.zeros(1, 2, grid.tokens, 64, dtype=dtype, device=device)
    block_plan = Plan.dense(grid.tokens, 128, device)
    if name == "flex" and not compile_executors:
        return executor(name).why_not(q, q, block_plan) or "not checked, because it has to be compiled"
    clusters = Clusters.from_labels(block_plan.query_group, block_plan.blocks)
    plans = (block_plan, ClusterPlan.from_mask(block_plan.block_mask(), clusters, clusters))
    supported = next((plan for plan in plans if why_not(name, q, q, plan) is None), None)
    if supported is None:
        return why_not(name, q, q, block_plan)
    return self_check(name, CallSignature.from_call(q, supported)) or "ok"
