"""FlashInfer's block-sparse attention (Z. Ye et al., arXiv:2501.01005): its wrapper of fixed blocks where blocks are
alike, its wrapper of variable blocks for ragged ends and clusters.

The fixed wrapper knows one pattern for all heads. Here the heads of a batch follow one another as one long sequence
whose pattern is block-diagonal, so that each has its own. Both wrappers plan on the host, which waits for the device.
FlashInfer's log-sum-exp is to base 2.
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
from dit_sparse.plan import Plan, reorder

LSE = True
CLUSTERS = True
THIRD_PARTY = True
_WORKSPACE = 128 << 20  # bytes, as its documentation recommends


def why_not(q: Tensor, k: Tensor, plan: Plan | ClusterPlan) -> str | None:
    if importlib.util.find_spec("flashinfer") is None:
        return "the package flashinfer-python is not installed"
    if reason := launching.why_not_elsewhere("FlashInfer", q, k):
        return reason
    if q.shape[-1] not in (64, 128, 256):
        return f"FlashInfer takes a head_dim of 64, 128 or 256, not {q.shape[-1]}"
    if plan.lengths is not None:
        return "FlashInfer's block-sparse wrappers take no padding"
    return None


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan | ClusterPlan, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of ``q [B, H, N, D]`` over the kept blocks of ``k, v [B, Hkv, N, D]``; see ``reference.attend``."""
    query_order = plan.queries.order if isinstance(plan, ClusterPlan) else plan.order
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))  # every head has lists of its own
    inputs = [reorder(x, order).flatten(0, 1) for x, order in ((q, query_order), (k, plan.order), (v, plan.order))]
    alike = isinstance(plan, Plan) and plan.tokens % plan.block == 0
    out, lse = (_fixed if alike else _variable)(inputs, plan, q.shape[:2], scale)
    out, lse = out.reshape(q.shape), lse.reshape(q.shape[:3]) * math.log(2)
    if query_order is None:
        return out, lse
    back = query_order.argsort(-1)
    return reorder(out, back), reorder(lse, back)


def _fixed(inputs: list[Tensor], plan: Plan, shape: torch.Size, scale: float | None) -> tuple[Tensor, Tensor]:
    """``inputs [B * H, N, D]``, all blocks of one size."""
    import flashinfer

    sequences, tokens, dim = inputs[0].shape
    first = torch.arange(sequences, device=plan.index.device).view(*shape, 1, 1) * plan.blocks
    index = (plan.index + first).expand(*shape, -1, -1)[plan.valid.expand(*shape, -1, -1)]
    count = plan.count.expand(*shape, -1).flatten()
    wrapper = flashinfer.BlockSparseAttentionWrapper(_workspace(inputs[0].device))
    wrapper.plan(
        F.pad(count.cumsum(0), (1, 0)).int(), index.int(), sequences * tokens, sequences * tokens,
        plan.block, plan.block, 1, 1, dim, sm_scale=scale, q_data_type=inputs[0].dtype, o_data_type=inputs[0].dtype,
    )  # fmt: skip
    return wrapper.run(*(x.reshape(-1, 1, dim) for x in inputs), return_lse=True)


def _variable(
    inputs: list[Tensor], plan: Plan | ClusterPlan, shape: torch.Size, scale: float | None
) -> tuple[Tensor, Tensor]:
    """``inputs [B * H, N, D]``, blocks of any size."""
    import flashinfer

    sequences, _, dim = inputs[0].shape
    keep, rows, columns = (
        x.expand(*shape, *x.shape[2:]).flatten(0, 1) for x in (plan.block_mask(), plan.query_sizes, plan.key_sizes)
    )
    wrapper = flashinfer.VariableBlockSparseAttentionWrapper(_workspace(inputs[0].device))
    wrapper.plan(
        keep, rows.int(), columns.int(), sequences, sequences, dim, sm_scale=scale, q_data_type=inputs[0].dtype
    )
    return wrapper.run(*inputs, return_lse=True)


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    return torch.empty(_WORKSPACE, dtype=torch.uint8, device=device)
