"""Block-sparse attention in plain PyTorch: any device and shape, no compiler, no N x N tensor.

Query blocks that keep the same number of key blocks are batched: their key blocks are gathered, followed by two batched
matrix products and a softmax. A chunk holds about a million scores, which fit in the cache of a CPU core. Clusters
differ in size and are computed one at a time.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.clusters import ClusterPlan
from dit_sparse.kernels.tail import with_tail
from dit_sparse.plan import Plan

LSE = True
CLUSTERS = True
SCORES_PER_CHUNK = 1 << 20


def why_not(q: Tensor, k: Tensor, plan: Plan | ClusterPlan) -> str | None:
    return None


@with_tail
def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan | ClusterPlan, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Compute attention as specified in `executors`, in float32."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (_attend_clusters if isinstance(plan, ClusterPlan) else _attend_blocks)(q, k, v, plan, scale)


def _attend_blocks(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = q.shape
    q, k, v = (plan.arrange(x) for x in (q, k, v))
    query_blocks, key_blocks, value_blocks = (_split_into_blocks(x, plan) for x in (q, k, v))
    valid_keys = _valid_keys(plan, batch)
    first_key_block = _first_key_block(batch, heads, k.shape[1], plan.blocks, q.device)
    index = (plan.index.expand(batch, heads, -1, -1) + first_key_block).flatten(0, 2)
    count = plan.count.expand(batch, heads, -1).flatten()
    item = torch.arange(batch, device=q.device).repeat_interleave(heads * plan.blocks)

    out = torch.zeros(len(count), plan.block, dim, device=q.device)
    lse = torch.full((len(count), plan.block), -torch.inf, device=q.device)
    for num_kept in count.unique().tolist():
        same_count = (count == num_kept).nonzero().flatten()
        for rows in same_count.split(max(1, SCORES_PER_CHUNK // (plan.block**2 * num_kept))):
            kept = index[rows, :num_kept].long()
            key_mask = valid_keys[item[rows, None], kept % plan.blocks].flatten(1)
            keys, values = key_blocks[kept].flatten(1, 2), value_blocks[kept].flatten(1, 2)
            out[rows], lse[rows] = _masked_attention(query_blocks[rows], keys, values, scale, key_mask)

    shape = (batch, heads, plan.blocks * plan.block)
    out, lse = out.view(*shape, dim)[:, :, :tokens], lse.view(shape)[:, :, :tokens]
    return plan.restore(out).to(q.dtype), plan.restore(lse)


def _attend_clusters(q: Tensor, k: Tensor, v: Tensor, plan: ClusterPlan, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = q.shape
    out, lse = torch.zeros_like(q), torch.full((batch, heads, tokens), -torch.inf, device=q.device)
    lengths = [tokens] * batch if plan.lengths is None else plan.lengths.tolist()
    fields = (plan.queries.order, plan.queries.edges, plan.keys.order, plan.keys.edges, plan.index, plan.count)
    fields = [x.expand(batch, heads, *x.shape[2:]) for x in fields]
    for item, head in product(range(batch), range(heads)):
        query_order, query_edges, key_order, key_edges, index, count = (x[item, head] for x in fields)
        key_head = head // (heads // k.shape[1])
        key_clusters = key_order.split(key_edges.diff().tolist())
        query_clusters = query_order.split(query_edges.diff().tolist())
        for queries, kept, num_kept in zip(query_clusters, index, count, strict=True):
            keys = torch.cat([key_clusters[c] for c in kept[:num_kept].tolist()])
            keys = keys[keys < lengths[item]]
            if len(queries) and len(keys):
                tensors = q[item, head, queries], k[item, key_head, keys], v[item, key_head, keys]
                cluster_out, lse[item, head, queries] = _masked_attention(*tensors, scale)
                out[item, head, queries] = cluster_out.to(q.dtype)
    return out, lse


def _masked_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp of ``q [..., M, D]`` over ``k, v [..., L, D]`` where ``key_mask [..., L]`` is
    True."""
    scores = (q.float() @ k.float().mT).mul_(scale)
    if key_mask is not None and not key_mask.all():
        scores.masked_fill_(~key_mask[..., None, :], -torch.inf)
        v = v.masked_fill(~key_mask[..., None], 0.0)  # padding may hold NaN, which a weight of zero would not remove
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse.nan_to_num(neginf=0.0)[..., None]).exp_()
    return weights @ v.float(), lse


def _split_into_blocks(x: Tensor, plan: Plan) -> Tensor:
    """``[B, H, N, D] -> [B * H * Qb, block, D]``; the last block is padded with zeros."""
    return F.pad(x, (0, 0, 0, -plan.tokens % plan.block)).reshape(-1, plan.block, x.shape[-1])


def _valid_keys(plan: Plan, batch: int) -> Tensor:
    """Return which keys of each block are not padding, bool ``[B, Qb, block]``."""
    position = torch.arange(plan.blocks * plan.block, device=plan.index.device)
    end = plan.tokens if plan.lengths is None else plan.lengths[:, None]
    return (position < end).expand(batch, -1).unflatten(-1, (plan.blocks, plan.block))


def _first_key_block(batch: int, heads: int, key_heads: int, blocks: int, device: torch.device) -> Tensor:
    """Return the first key block of each batch item and query head in the flattened key blocks, ``[B, H, 1, 1]``."""
    key_head = torch.arange(heads, device=device) // (heads // key_heads)
    item = torch.arange(batch, device=device)[:, None] * key_heads
    return ((item + key_head) * blocks)[..., None, None]
