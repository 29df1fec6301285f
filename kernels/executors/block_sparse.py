"""Block-sparse attention in Triton, for NVIDIA GPUs from Ampere on."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.gpu.architectures import Architecture
from dit_sparse.kernels.permute import permute_tokens
from dit_sparse.kernels.tail import tail_arguments
from dit_sparse.plan import Plan

LSE = True
CLUSTERS = False

BLOCKS = (16, 32, 64, 128)


def why_not(q: Tensor, k: Tensor, plan: Plan) -> str | None:
    if plan.block not in BLOCKS:
        return f"requires blocks of {', '.join(map(str, BLOCKS))} tokens, got {plan.block}"
    return launching.why_not(q, k)


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Compute attention as specified in `executors`. ``out`` has q's memory layout.

    The kernel reads queries and writes outputs through the plan's order; only keys and values are copied.
    """
    from dit_sparse.kernels.gpu.block_sparse import block_sparse_kernel

    arguments, out, lse = launch_arguments(q, k, v, plan, scale, launching.device_architecture(q.device))
    with torch.cuda.device_of(q):
        block_sparse_kernel[(len(arguments["schedule"]),)](**arguments)
    return out, lse


def launch_arguments(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None, architecture: Architecture
) -> tuple[dict, Tensor, Tensor]:
    """Return the arguments of the kernel, and its outputs ``out`` and ``lse``."""
    batch, heads, _, dim = q.shape
    q, k, v = launching.with_contiguous_rows(q, *permute_tokens(plan.order, k, v))
    tiling = architecture.tiling(plan.block, dim)
    arguments, out, lse = launching.attention_arguments(q, k, v, scale, tiling, plan.block)
    index, count = plan.index.expand(batch, heads, -1, -1), plan.count.expand(batch, heads, -1)
    order = None if plan.order is None else plan.order.expand(batch, heads, -1)
    arguments |= tail_arguments(plan, q, k, v) | dict(
        index=index,
        count=count,
        order=order,
        lengths=plan.lengths,
        schedule=launching.schedule_longest_first(count, launching.heads_in_l2_cache(k, architecture.l2_cache)),
        index_strides=index.stride()[:3],
        count_strides=count.stride(),
        order_strides=(0, 0) if order is None else order.stride()[:2],
        BLOCK=plan.block,
    )
    return arguments, out, lse
