"""Block-sparse attention in plain PyTorch: any device, any shape, no compiler, no N x N tensor.

Rows of equal length are computed together: their key blocks are gathered, then two batched matrix products and a
softmax. Chunks hold about a million scores, which stays in a core's cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.plan import Plan

LSE = True
SCORES_PER_CHUNK = 1 << 20


def why_not(q: Tensor, k: Tensor, plan: Plan) -> str | None:
    """It runs wherever PyTorch does."""
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention of ``q [B, H, N, D]`` over the kept blocks of ``k, v [B, Hkv, N, D]``; see ``reference.attend``.
    Computes in float32."""
    batch, heads, tokens, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    q, k, v = (plan.arrange(x) for x in (q, k, v))
    queries, keys, values = (_blocked(x, plan) for x in (q, k, v))
    valid = _valid(plan, batch)
    first_key_block = _first_key_block(batch, heads, k.shape[1], plan.blocks, q.device)
    index = (plan.index.expand(batch, heads, -1, -1) + first_key_block).flatten(0, 2)
    count = plan.count.expand(batch, heads, -1).flatten()
    item = torch.arange(batch, device=q.device).repeat_interleave(heads * plan.blocks)

    out = torch.zeros(len(count), plan.block, dim, device=q.device)
    lse = torch.full((len(count), plan.block), -torch.inf, device=q.device)
    for live in count.unique().tolist():
        rows_alike = (count == live).nonzero().flatten()
        for rows in rows_alike.split(max(1, SCORES_PER_CHUNK // (plan.block**2 * live))):
            kept = index[rows, :live].long()
            seen = valid[item[rows, None], kept % plan.blocks].flatten(1)
            out[rows], lse[rows] = _dense(
                queries[rows], keys[kept].flatten(1, 2), values[kept].flatten(1, 2), seen, scale
            )

    shape = (batch, heads, plan.blocks * plan.block)
    out, lse = out.view(*shape, dim)[:, :, :tokens], lse.view(shape)[:, :, :tokens]
    return plan.restore(out).to(q.dtype), plan.restore(lse)


def _dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention ``[R, M, D] x [R, L, D]`` over the keys that are ``seen [R, L]``."""
    scores = torch.bmm(q.float(), k.float().mT).mul_(scale)
    if not seen.all():
        scores.masked_fill_(~seen[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse.nan_to_num(neginf=0.0)[..., None]).exp_()
    return torch.bmm(weights, v.float()), lse


def _blocked(x: Tensor, plan: Plan) -> Tensor:
    """``[B, H, N, D] -> [B * H * Qb, block, D]``, the last block filled up with zeros."""
    return F.pad(x, (0, 0, 0, -plan.tokens % plan.block)).reshape(-1, plan.block, x.shape[-1])


def _valid(plan: Plan, batch: int) -> Tensor:
    """Which keys of each block are real, bool ``[B, Qb, block]``."""
    place = torch.arange(plan.blocks * plan.block, device=plan.index.device)
    end = plan.tokens if plan.lengths is None else plan.lengths[:, None]
    return (place < end).expand(batch, -1).unflatten(-1, (plan.blocks, plan.block))


def _first_key_block(batch: int, heads: int, key_heads: int, blocks: int, device: torch.device) -> Tensor:
    """Where the key blocks of every batch item and head start, ``[B, H, 1, 1]``."""
    key_head = torch.arange(heads, device=device) // (heads // key_heads)
    item = torch.arange(batch, device=device)[:, None] * key_heads
    return ((item + key_head) * blocks)[..., None, None]
