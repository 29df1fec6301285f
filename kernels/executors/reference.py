"""Reference executor: masked softmax attention in float32 with the full token mask. For tests; slow and large."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.clusters import ClusterPlan
from dit_sparse.kernels.tail import PooledTail, kept_terms
from dit_sparse.order import reorder
from dit_sparse.plan import Plan

LSE = True
CLUSTERS = True
MAX_TOKENS = 16384


def why_not(q: Tensor, k: Tensor, plan: Plan | ClusterPlan) -> str | None:
    if q.shape[2] > MAX_TOKENS:
        return f"supports at most {MAX_TOKENS} tokens because it stores an N x N mask, got {q.shape[2]}"
    return None


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan | ClusterPlan, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Compute attention as specified in `executors`."""
    batch, heads, _, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    k, v = (x.repeat_interleave(heads // k.shape[1], 1).float() for x in (k, v))
    if plan.lengths is not None:  # padding may hold NaN, which a weight of zero would not remove
        v = v.masked_fill((torch.arange(plan.tokens, device=v.device) >= plan.lengths[:, None])[:, None, :, None], 0.0)
    scores = (q.float() @ k.mT * scale).masked_fill(~token_mask(plan, batch, heads), -torch.inf)
    if plan.tail is not None:
        tail = PooledTail.from_plan(plan, reorder(k, plan.order), reorder(v, plan.order))
        logits = q.float() @ tail.keys.mT * scale + tail.log_sizes[:, :, None]
        kept = torch.take_along_dim(kept_terms(plan, tail.group), plan.query_group[..., None], 2)
        scores, v = torch.cat([scores, logits.masked_fill(kept, -torch.inf)], -1), torch.cat([v, tail.values], 2)
    lse = scores.logsumexp(-1)
    weights = torch.where(lse.isneginf()[..., None], 0.0, scores.softmax(-1))
    return (weights @ v).to(q.dtype), lse


def token_mask(plan: Plan | ClusterPlan, batch: int, heads: int) -> Tensor:
    """Return the mask of kept token pairs, bool ``[B, H, N, N]``."""
    mask = torch.take_along_dim(plan.block_mask(), plan.query_group[..., None], 2)
    mask = torch.take_along_dim(mask, plan.key_group[..., None, :], 3).expand(batch, heads, -1, -1)
    if plan.lengths is None:
        return mask
    return mask & (torch.arange(plan.tokens, device=mask.device) < plan.lengths[:, None])[:, None, None]
