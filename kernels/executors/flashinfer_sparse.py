"""Block-sparse attention of FlashInfer (Z. Ye et al., arXiv:2501.01005).

Uses FlashInfer's wrapper for fixed blocks if all blocks have the same size, and its wrapper for variable blocks for a
ragged last block and for clusters. The fixed wrapper takes one pattern for all heads, so the heads of a batch are
concatenated to one sequence with a block-diagonal pattern. Both wrappers plan on the host, which synchronizes with the
GPU. FlashInfer returns the log-sum-exp to base 2.
"""

from __future__ import annotations

import functools
import importlib.util
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.clusters import ClusterPlan
from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.tail import with_tail
from dit_sparse.order import reorder
from dit_sparse.plan import Plan

LSE = True
CLUSTERS = True
THIRD_PARTY = True
WORKSPACE_BYTES = 128 << 20  # recommended by FlashInfer's documentation


def why_not(q: Tensor, k: Tensor, plan: Plan | ClusterPlan) -> str | None:
    if importlib.util.find_spec("flashinfer") is None:
        return "requires the package flashinfer-python"
    if reason := launching.why_not_third_party(q, k):
        return reason
    if q.shape[-1] not in (64, 128, 256):
        return f"requires a head_dim of 64, 128 or 256, got {q.shape[-1]}"
    if plan.lengths is not None:
        return "does not support padding together with block sparsity"
    return None


@with_tail
def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan | ClusterPlan, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Compute attention as specified in `executors`."""
    q, scale = launching.with_positive_scale(q, scale)
    query_order = plan.queries.order if isinstance(plan, ClusterPlan) else plan.order
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))  # each query head has its own lists
    inputs = [reorder(x, order).flatten(0, 1) for x, order in ((q, query_order), (k, plan.order), (v, plan.order))]
    equal_blocks = isinstance(plan, Plan) and plan.tokens % plan.block == 0
    attend_heads = _attend_fixed_blocks if equal_blocks else _attend_variable_blocks
    out, lse = attend_heads(inputs, plan, q.shape[:2], scale)
    out, lse = out.reshape(q.shape), lse.reshape(q.shape[:3]) * math.log(2)
    if query_order is None:
        return out, lse
    inverse = query_order.argsort(-1)
    return reorder(out, inverse), reorder(lse, inverse)


def _attend_fixed_blocks(
    inputs: list[Tensor], plan: Plan, shape: torch.Size, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Compute attention of ``inputs [B * H, N, D]`` with blocks of one size; ``shape`` is ``[B, H]``."""
    import flashinfer

    sequences, tokens, dim = inputs[0].shape
    first_block = torch.arange(sequences, device=plan.index.device).view(*shape, 1, 1) * plan.blocks
    index = (plan.index + first_block).expand(*shape, -1, -1)[plan.valid.expand(*shape, -1, -1)]
    count = plan.count.expand(*shape, -1).flatten()
    wrapper = flashinfer.BlockSparseAttentionWrapper(_workspace(inputs[0].device))
    wrapper.plan(
        F.pad(count.cumsum(0), (1, 0)).int(), index.int(), sequences * tokens, sequences * tokens,
        plan.block, plan.block, 1, 1, dim, sm_scale=scale, q_data_type=inputs[0].dtype, o_data_type=inputs[0].dtype,
    )  # fmt: skip
    return wrapper.run(*(x.reshape(-1, 1, dim) for x in inputs), return_lse=True)


def _attend_variable_blocks(
    inputs: list[Tensor], plan: Plan | ClusterPlan, shape: torch.Size, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Compute attention of ``inputs [B * H, N, D]`` with blocks of any size; ``shape`` is ``[B, H]``."""
    import flashinfer

    sequences, _, dim = inputs[0].shape
    mask, query_sizes, key_sizes = (
        x.expand(*shape, *x.shape[2:]).flatten(0, 1) for x in (plan.block_mask(), plan.query_sizes, plan.key_sizes)
    )
    wrapper = flashinfer.VariableBlockSparseAttentionWrapper(_workspace(inputs[0].device))
    dtype = inputs[0].dtype
    wrapper.plan(mask, query_sizes.int(), key_sizes.int(), sequences, sequences, dim, sm_scale=scale, q_data_type=dtype)
    return wrapper.run(*inputs, return_lse=True)


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
