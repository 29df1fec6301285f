"""Block-sparse attention in Triton, for NVIDIA GPUs from Ampere on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.gpu.architectures import Architecture
from dit_sparse.kernels.permute import permuted
from dit_sparse.plan import Plan

LSE = True
CLUSTERS = False

BLOCKS = (16, 32, 64, 128)


def why_not(q: Tensor, k: Tensor, plan: Plan) -> str | None:
    if plan.block not in BLOCKS:
        return f"a block must have {', '.join(map(str, BLOCKS))} tokens, not {plan.block}"
    return launching.why_not(q, k)


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention of ``q [B, H, N, D]`` over the kept blocks of ``k, v [B, Hkv, N, D]`` (Hkv divides H).

    Queries are read, and the output is written, through the plan's order; only keys and values are moved.

    Returns:
        out ``[B, H, N, D]`` with q's dtype and memory layout, and the natural-log-sum-exp of the kept scores,
        float32 ``[B, H, N]``. A row without any valid key gives 0 and -inf.
    """
    from dit_sparse.kernels.gpu.block_sparse import forward

    arguments, out, lse = launch(q, k, v, plan, scale, launching.machine(q.device))
    with torch.cuda.device_of(q):
        forward[(len(arguments["schedule"]),)](**arguments)
    return out, lse


def launch(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None, machine: Architecture
) -> tuple[dict, Tensor, Tensor]:
    """The arguments of the kernel, and the two tensors that it will fill."""
    batch, heads, tokens, dim = q.shape
    tiling = machine.tiling(plan.block, dim)
    columns = tiling.columns(plan.block, dim)
    q, k, v = launching.in_rows(q, *permuted(plan.order, k, v))
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    index, count = plan.index.expand(batch, heads, -1, -1), plan.count.expand(batch, heads, -1)
    order = None if plan.order is None else plan.order.expand(batch, heads, -1)
    arguments = dict(
        launching.fetched({"k": k, "v": v}, tiling.keys, columns, tiling.tma),
        q=q,
        out=out,
        lse=lse,
        index=index,
        count=count,
        order=order,
        lengths=plan.lengths,
        schedule=launching.longest_first(count, launching.company(k, machine.cache)),
        q_strides=q.stride()[:3],
        k_strides=k.stride()[:3],
        v_strides=v.stride()[:3],
        out_strides=out.stride()[:3],
        index_strides=index.stride()[:3],
        count_strides=count.stride(),
        order_strides=(0, 0) if order is None else order.stride()[:2],
        heads=heads,
        group=heads // k.shape[1],
        tokens=tokens,
        scale=(dim**-0.5 if scale is None else scale) * math.log2(math.e),
        BLOCK=plan.block,
        KEYS=tiling.keys,
        WIDTHS=columns,
        TMA=tiling.tma,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return arguments, out, lse
