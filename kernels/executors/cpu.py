"""Block-sparse attention for x86 CPUs: a C++ operator, compiled with the local compiler at first use."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.clusters import ClusterPlan
from dit_sparse.kernels import cpu_library
from dit_sparse.kernels.gpu.launching import with_positive_scale
from dit_sparse.plan import Plan

LSE = True
CLUSTERS = True

_MAX_HEAD_DIM = 512


def why_not(q: Tensor, k: Tensor, plan: Plan | ClusterPlan) -> str | None:
    """See `executors`. Compiles the operator if the tensors and the machine are supported."""
    if q.device.type != "cpu":
        return f"requires CPU tensors, got {q.device.type} tensors"
    if q.dtype not in (torch.float32, torch.bfloat16) or k.dtype != q.dtype:
        return f"requires float32 or bfloat16, the same for all inputs, got {q.dtype} and {k.dtype}"
    if q.shape[-1] % 8 or not 8 <= q.shape[-1] <= _MAX_HEAD_DIM:
        return f"requires a head_dim that is a multiple of 8, at most {_MAX_HEAD_DIM}, got {q.shape[-1]}"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return "has no backward pass, got inputs that require grad; call it under torch.no_grad()"
    return cpu_library.why_not("block_sparse")


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan | ClusterPlan, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Compute attention as specified in `executors`. ``out`` has q's memory layout.

    Raises:
        RuntimeError: the operator cannot be compiled or loaded.
        IndexError: the plan holds the number of a key group that does not exist.
    """
    if reason := cpu_library.why_not("block_sparse"):
        raise RuntimeError(f"executor 'cpu' is unavailable: {reason}")
    batch, heads, tokens, dim = q.shape
    q, scale = with_positive_scale(q, scale)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32)
    clusters = isinstance(plan, ClusterPlan)
    orders = (plan.queries.order, plan.keys.order) if clusters else (plan.order, plan.order)
    edges = (plan.queries.edges, plan.keys.edges) if clusters else (None, None)
    per_head_fields = (x for x in (orders[1], edges[1]) if x is not None and x.ndim == 3)
    torch.ops.dit_sparse_cpu.attend_into(
        out,
        lse,
        q,
        k,
        v,
        _expand_per_head(plan.index, torch.int32, batch, heads),
        _expand_per_head(plan.count, torch.int32, batch, heads),
        _expand_per_head(orders[0], torch.int64, batch, heads),
        _expand_per_head(edges[0], torch.int32, batch, heads),
        _expand_per_head(orders[1], torch.int64, batch, heads),
        _expand_per_head(edges[1], torch.int32, batch, heads),
        any(x.shape[1] > 1 for x in per_head_fields),
        plan.lengths if plan.lengths is None else plan.lengths.to(torch.int32).contiguous(),
        0 if clusters else plan.block,
        plan.tail or 0,
        dim**-0.5 if scale is None else scale,
    )
    return out, lse


def _expand_per_head(x: Tensor | None, dtype: torch.dtype, batch: int, heads: int) -> Tensor | None:
    """Expand a field of a plan, ``[K]`` or ``[B|1, H|1, ..., K]``, to ``[B, H, ..., K]`` without a copy."""
    if x is None:
        return None
    x = x.to(dtype).contiguous()
    return x.expand(batch, heads, *x.shape[2:] if x.ndim > 1 else x.shape)
