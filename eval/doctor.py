"""What this machine can run, and why not the rest."""

from __future__ import annotations

import torch

from dit_sparse import Grid, Plan, attention
from dit_sparse.kernels.pick import EXECUTORS, executor

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
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, grid.tokens, 64, generator=generator).to(device).unbind(0)
    if reason := executor(name).why_not(q, k, Plan.full(grid.tokens, block, device)):
        return reason
    if name == "flex" and not compile_executors:
        return "not tried, for it compiles for a while"
    try:
        call = dict(grid=grid, method="random_blocks", density=0.4, block=block)
        out, _ = attention(q, k, v, executor=name, **call)
        expected, _ = attention(q, k, v, executor="reference", **call)
    except Exception as error:
        return f"failed: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
    error = float((out - expected).abs().max())
    return "ok" if error < 1e-3 else f"wrong here: differs from the reference by {error:.2g}"
