"""Pooled tail of a plan: the keys that a row does not compute take part in its softmax as means of a few keys each.

Source: H. Ren et al., "Combiner: Full Attention Transformer with Sparse Computation Cost", arXiv:2107.05768, whose
direct and pooled regions share one softmax. A pooled term of n keys with mean key m and mean value w joins the softmax
of query q with

    logit  q . m * scale + log n,        value  w.

The terms of a plan are at most ``plan.tail`` consecutive tokens of the order of its keys, without padding, and never
cross the edge of a key group. A row uses the terms of the key groups that it does not keep.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.clusters import ClusterPlan
from dit_sparse.order import reorder
from dit_sparse.plan import Plan, num_blocks

SCORES_PER_CHUNK = 1 << 20


@dataclass(frozen=True)
class PooledTail:
    """The G pooled terms of a plan, in the order of its keys.

    Attributes:
        keys, values: means, float32 ``[B, Hkv, G, D]``, with a head for each query head if the plan orders or groups
            the keys of heads differently.
        log_sizes: logarithm of the tokens of each term, float32 ``[B|1, H|1, G]``; -inf if it has none.
        group: key group that each term belongs to, int64 ``[B|1, H|1, G]``.
    """

    keys: Tensor
    values: Tensor
    log_sizes: Tensor
    group: Tensor

    @classmethod
    def from_plan(cls, plan: Plan | ClusterPlan, k: Tensor, v: Tensor) -> PooledTail:
        """Pool ``k, v [B, Hkv, N, D]``, which are in the order of the plan's keys."""
        edges, group = term_edges(plan)
        if plan.lengths is not None:
            edges = edges.minimum(plan.lengths[:, None, None].to(edges.dtype))
        sizes = edges.diff(dim=-1)
        return cls(*(_segment_means(x, edges) for x in (k, v)), sizes.float().log(), group)


def term_edges(plan: Plan | ClusterPlan) -> tuple[Tensor, Tensor]:
    """Return where the terms of a plan begin and end in the order of its keys, padding included.

    Returns:
        Edges from 0 to N, int64 ``[B|1, H|1, G + 1]``, and the key group of each term, int64 ``[B|1, H|1, G]``. G
        depends on sizes alone, so that nothing synchronizes with a GPU; the last terms of clusters may be empty.
    """
    device, tokens, size = plan.index.device, plan.tokens, plan.tail
    if isinstance(plan, Plan):
        size, parts = min(size, plan.block), num_blocks(plan.block, plan.tail)
        full, rest = divmod(tokens, plan.block)
        number = torch.arange(full * parts + num_blocks(rest, size), device=device)[None, None]
        group = number // parts
        starts = group * plan.block + number % parts * size
    else:
        first, parts = plan.keys.edges[..., :-1].long(), -(-plan.keys.sizes // size)
        so_far = parts.cumsum(-1)
        terms = min(tokens, tokens // size + parts.shape[-1])
        number = torch.arange(terms, device=device).expand(*parts.shape[:-1], -1).contiguous()
        group = torch.searchsorted(so_far, number, right=True)
        is_unused, group = group == parts.shape[-1], group.clamp(max=parts.shape[-1] - 1)
        starts = first.gather(-1, group) + (number - (so_far - parts).gather(-1, group)) * size
        starts = starts.masked_fill(is_unused, tokens)
    return F.pad(starts, (0, 1), value=tokens), group


def _segment_means(x: Tensor, edges: Tensor) -> Tensor:
    """Return the means of segments of ``x [B, Hx, N, D]``, float32 ``[B, H, G, D]``; 0 if empty."""
    x = x.repeat_interleave(max(1, edges.shape[1] // x.shape[1]), 1)
    edges = edges.expand(*x.shape[:2], -1).contiguous()
    sums = torch.segment_reduce(x.float().contiguous(), "sum", offsets=edges, axis=2, unsafe=True, initial=0)
    return sums / edges.diff(dim=-1).clamp(min=1)[..., None]


def attend_tail(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan | ClusterPlan, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Compute attention of each query over the pooled terms of the key groups that it does not keep.

    Args:
        q, k, v: ``[B, H, N, D]``, ``[B, Hkv, N, D]`` twice, in the order of the input.
        plan: a plan with a tail.
        scale: of the scores; None: ``D ** -0.5``.

    Returns:
        Output and natural log-sum-exp, float32 ``[B, H, N, D]`` and ``[B, H, N]``; 0 and -inf for a query without
        terms.
    """
    heads, tokens, dim = q.shape[1:]
    tail = PooledTail.from_plan(plan, reorder(k, plan.order), reorder(v, plan.order))
    scale = dim**-0.5 if scale is None else scale
    keys, values = (x.repeat_interleave(heads // x.shape[1], 1) for x in (tail.keys, tail.values))
    kept, group = kept_terms(plan, tail.group), plan.query_group
    chunks = []
    for rows in torch.arange(tokens, device=q.device).split(max(1, SCORES_PER_CHUNK // keys.shape[:3].numel())):
        logits = torch.add(tail.log_sizes[:, :, None], q[:, :, rows].float() @ keys.mT, alpha=scale)
        logits.masked_fill_(torch.take_along_dim(kept, group[..., rows, None], 2), -torch.inf)
        lse = logits.logsumexp(-1)
        chunks.append((logits.sub_(lse.nan_to_num(neginf=0.0)[..., None]).exp_() @ values, lse))
    out, lse = (torch.cat(parts, 2) for parts in zip(*chunks, strict=True))
    return out, lse


def kept_terms(plan: Plan | ClusterPlan, group: Tensor) -> Tensor:
    """Return which terms belong to a key group that a query group keeps, bool ``[B|1, H|1, Q, G]``."""
    return torch.take_along_dim(plan.block_mask(), group[:, :, None], -1)


def add_tail(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: Plan | ClusterPlan, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Merge the output of the kept pairs, ``out [B, H, N, D]`` and ``lse [B, H, N]``, with the tail of the plan."""
    merged, lse = merge_attention(out, lse, *attend_tail(q, k, v, plan, scale))
    return merged.to(out.dtype), lse


def tail_arguments(plan: Plan | ClusterPlan, q: Tensor, k: Tensor, v: Tensor) -> dict:
    """Return the arguments ``tail_*`` of the Triton attention kernels, None and 0 for a plan without a tail.

    Args:
        q: ``[B, H, N, D]``; pooled terms get its dtype.
        k, v: ``[B, Hkv, N, D]`` in the order of the plan's keys.
    """
    names = {"k": 3, "v": 3, "log_sizes": 2, "groups": 2, "kept": 3}  # and the number of strides
    if plan.tail is None:
        tensors = dict.fromkeys(f"tail_{name}" for name in names)
        strides = {f"tail_{name}_strides": (0,) * count for name, count in names.items()}
        return tensors | strides | dict(tail_group_size=1, tail_terms=0)
    tail = PooledTail.from_plan(plan, k, v)
    lead = lambda x: x.expand(*q.shape[:2], *x.shape[2:])
    tensors = {"k": tail.keys.to(q.dtype), "v": tail.values.to(q.dtype)}
    tensors |= {"log_sizes": lead(tail.log_sizes * math.log2(math.e)), "groups": lead(tail.group.int())}
    tensors |= {"kept": lead(plan.block_mask().view(torch.int8))}
    strides = {f"tail_{name}_strides": tensors[name].stride()[:count] for name, count in names.items()}
    sizes = dict(tail_group_size=q.shape[1] // tail.keys.shape[1], tail_terms=tail.keys.shape[2])
    return {f"tail_{name}": x for name, x in tensors.items()} | strides | sizes


def with_tail(attend: Callable) -> Callable:
    """Return an executor's ``attend`` that merges the tail of a plan, for an ``attend`` that computes only kept pairs
    and returns their log-sum-exp."""

    @wraps(attend)
    def attend_with_tail(q, k, v, plan, scale=None):
        out, lse = attend(q, k, v, plan, scale)
        return (out, lse) if plan.tail is None else add_tail(out, lse, q, k, v, plan, scale)

    return attend_with_tail


def merge_attention(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over two disjoint sets of keys into attention over both.

    Args:
        out, other: outputs over each set, ``[B, H, N, D]``.
        lse, other_lse: their log-sum-exps, ``[B, H, N]``; -inf for a set without keys.

    Returns:
        Output and log-sum-exp in float32.
    """
    total = torch.logaddexp(lse, other_lse)
    safe = total.nan_to_num(neginf=0.0)
    weight, other_weight = ((part - safe).exp()[..., None] for part in (lse, other_lse))
    return weight * out.float() + other_weight * other.float(), total
