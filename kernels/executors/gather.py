"""Block-sparse attention in plain PyTorch: any device, any shape, no compiler, no N x N tensor.

Rows of equal length are computed together: their key blocks are gathered, then two batched matrix products and a
softmax. Chunks hold about a million scores, which stays in a core's cache. Clusters, no two alike, go one by one.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.clusters import ClusterPlan
from dit_sparse.plan import Plan

LSE = True
CLUSTERS = True
SCORES_PER_CHUNK = 1 << 20


def why_not(q: Tensor, k: Tensor, plan: Plan | ClusterPlan) -> str | None:
    """It runs wherever PyTorch does."""
    return None


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan | ClusterPlan, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of ``q [B, H, N, D]`` over the kept blocks of ``k, v [B, Hkv, N, D]``; see ``reference.attend``.
    Computes in float32."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (_clusters if isinstance(plan, ClusterPlan) else _blocks)(q, k, v, plan, scale)


def _blocks(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = q.shape
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
                queries[rows], keys[kept].flatten(1, 2), values[kept].flatten(1, 2), scale, seen
            )

    shape = (batch, heads, plan.blocks * plan.block)
    out, lse = out.view(*shape, dim)[:, :, :tokens], lse.view(shape)[:, :, :tokens]
    return plan.restore(out).to(q.dtype), plan.restore(lse)


def _clusters(q: Tensor, k: Tensor, v: Tensor, plan: ClusterPlan, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = q.shape
    out, lse = torch.zeros_like(q), torch.full((batch, heads, tokens), -torch.inf, device=q.device)
    lengths = [tokens] * batch if plan.lengths is None else plan.lengths.tolist()
    parts = (plan.queries.order, plan.queries.edges, plan.keys.order, plan.keys.edges, plan.index, plan.count)
    parts = [x.expand(batch, heads, *x.shape[2:]) for x in parts]
    for item, head in product(range(batch), range(heads)):
        query_order, query_edges, key_order, key_edges, index, count = (x[item, head] for x in parts)
        key_head = head // (heads // k.shape[1])
        key_members = key_order.split(key_edges.diff().tolist())
        for rows, kept, live in zip(query_order.split(query_edges.diff().tolist()), index, count, strict=True):
            keys = torch.cat([key_members[c] for c in kept[:live].tolist()])
            keys = keys[keys < lengths[item]]
            if len(rows) and len(keys):
                found = _dense(q[item, head, rows], k[item, key_head, keys], v[item, key_head, keys], scale)
                out[item, head, rows], lse[item, head, rows] = found[0].to(q.dtype), found[1]
    return out, lse


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention ``[..., M, D] x [..., L, D]``, over the keys that are ``seen [..., L]``."""
    scores = (q.float() @ k.float().mT).mul_(scale)
    if seen is not None and not seen.all():
        scores.masked_fill_(~seen[..., None, :], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse.nan_to_num(neginf=0.0)[..., None]).exp_()
    return weights @ v.float(), lse


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
