"""The specification: softmax over the kept pairs, in float32, with the mask written out. For tests, not for speed."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.clusters import ClusterPlan
from dit_sparse.plan import Plan

LSE = True
CLUSTERS = True


def why_not(q: Tensor, k: Tensor, plan: Plan | ClusterPlan) -> str | None:
    """The reference holds N x N scores, so it declines what would not fit."""
    if q.shape[2] > 16384:
        return f"it writes the whole {q.shape[2]} x {q.shape[2]} mask out; use it up to 16384 tokens"
    return None


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan | ClusterPlan, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of ``q [B, H, N, D]`` over the kept blocks of ``k, v [B, Hkv, N, D]`` (Hkv divides H).

    Returns:
        out ``[B, H, N, D]`` in q's dtype, and the natural-log-sum-exp of the kept scores, float32 ``[B, H, N]``.
        A row without any valid key gives 0 and -inf.
    """
    batch, heads, _, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    k, v = (x.repeat_interleave(heads // k.shape[1], 1).float() for x in (k, v))
    mask = token_mask(plan, batch, heads)
    scores = (q.float() @ k.mT * scale).masked_fill(~mask, -torch.inf)
    weights = torch.where(mask.any(-1, keepdim=True), scores.softmax(-1), 0.0)
    return (weights @ v).to(q.dtype), scores.logsumexp(-1)


def token_mask(plan: Plan | ClusterPlan, batch: int, heads: int) -> Tensor:
    """The kept token pairs, bool ``[B, H, N, N]``."""
    mask = torch.take_along_dim(plan.block_mask(), plan.query_group[..., None], 2)
    mask = torch.take_along_dim(mask, plan.key_group[..., None, :], 3).expand(batch, heads, -1, -1)
    if plan.lengths is None:
        return mask
    return mask & (torch.arange(plan.tokens, device=mask.device) < plan.lengths[:, None])[:, None, None]
