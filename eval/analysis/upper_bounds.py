"""The attention a plan retains, and the most that any mask of as many pairs could: exact, from a known log-sum-exp.

With M_ij the share of a head's attention that lies in the pair (i, j) of query group and key group, w_ij the token
pairs in it and W those that a plan computes for this head:

    best            max sum t_ij M_ij  with  sum t_ij w_ij <= W  and  0 <= t_ij <= 1,  over the plan's own groups:
                    blocks cut from its own order, or its own clusters
    best_by_row     the same with the plan's own number of pairs in every row
    best_row_major  as best, over blocks cut from the tokens as they are given, whatever the plan's groups are

Letting the last pair count in part (t between 0 and 1) makes the first two true upper bounds where groups differ in
size; where all are equal, they are the masses of a mask. So retained <= best_by_row <= best. The third is one measure
for all methods; an order or clusters can beat it. Text and own blocks are in all bounds over blocks: those the plan
keeps in the first two, all of them in the third, as far as W reaches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse import ClusterPlan, Plan, Site
from dit_sparse.grid import Blocks
from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.planning.block_mass import block_mass
from dit_sparse.method import AttentionOutput, required_blocks


def kept_and_best(done: AttentionOutput, plan: Plan | ClusterPlan, site: Site, row_major: Tensor) -> dict[str, Tensor]:
    """What a plan retains of a dense call, and the three bounds, float64 ``[B, H]`` each."""
    own_groups = isinstance(plan, ClusterPlan) or plan.order is not None
    mass = group_mass(done.q, done.k, done.lse, plan, done.scale) if own_groups else row_major
    keep, pairs, pairs_row_major = plan.block_mask(), _pairs(plan), _pairs(done.plan)
    always = required_blocks(Blocks.from_grid(site.grid, site.block)).to(
        mass.device
    )  # the same in all orders: text stays put
    forced = keep & False if isinstance(plan, ClusterPlan) else keep & always
    spent = (pairs * keep).sum(-1)
    return {
        "retained": (mass * keep).sum((-2, -1)),
        "best": best_mass(mass.flatten(2), pairs.flatten(2), spent.sum(-1), forced.flatten(2)),
        "best_by_row": best_mass(mass, pairs, spent, forced).sum(-1),
        "best_row_major": best_mass(row_major.flatten(2), pairs_row_major.flatten(2), spent.sum(-1), always.flatten()),
    }


def best_mass(mass: Tensor, pairs: Tensor, budget: Tensor, forced: Tensor) -> Tensor:
    """The most mass that a budget of token pairs can buy, ``[...]``, the last of what is taken counting in part.

    Args:
        mass: of every pair of groups, float64 ``[..., P]``.
        pairs: token pairs in each of them, and ``forced``, which are taken first; they expand to the mass.
        budget: token pairs, expands to ``[...]``.
    """
    worth = (mass / pairs.clamp(min=1)).masked_fill(forced, torch.inf)
    rank = worth.argsort(-1, descending=True)
    mass, pairs = mass.gather(-1, rank), pairs.expand_as(mass).gather(-1, rank)
    left = budget[..., None] - (pairs.cumsum(-1) - pairs)
    return ((left / pairs.clamp(min=1)).clamp(0, 1) * mass).sum(-1)


def group_mass(q: Tensor, k: Tensor, lse: Tensor, plan: Plan | ClusterPlan, scale: float | None = None) -> Tensor:
    """Share of each head's attention that lies in each pair of a plan's groups, kept or not: float64 ``[B, H, Q, K]``,
    in sum 1. Queries that are no padding count alike. ``q [B, H, N, D]``, ``k [B, Hkv, N, D]``, ``lse [B, H, N]`` of
    all scores."""
    if isinstance(plan, ClusterPlan):
        sums = _between_clusters(q, k, lse, plan, scale)
    else:
        sums = block_mass(q, k, lse, plan.block, order=plan.order, lengths=plan.lengths, scale=scale)
    queries = plan.query_sizes.double()
    if plan.lengths is not None:
        lead = (*q.shape[:2], -1)
        real = real_tokens(plan).double().expand(lead)
        queries = real.new_zeros(queries.expand(lead).shape).scatter_add_(-1, plan.query_group.expand(lead), real)
    sums = sums.double() / sums.sum(-1, keepdim=True, dtype=torch.float64).clamp(min=1e-30)
    return sums * (queries / queries.sum(-1, keepdim=True))[..., None]


def _between_clusters(q: Tensor, k: Tensor, lse: Tensor, plan: ClusterPlan, scale: float | None) -> Tensor:
    """Attention that query clusters pay to key clusters, float32 ``[B, H, Cq, Ck]``, some queries at a time."""
    (batch, heads, tokens, dim), clusters = q.shape, plan.key_sizes.shape[-1]
    k = k.repeat_interleave(heads // k.shape[1], 1).float()
    real = None if plan.lengths is None else real_tokens(plan)
    total = torch.zeros(batch, heads, plan.query_sizes.shape[-1], clusters, device=q.device)
    for rows in torch.arange(tokens, device=q.device).split(
        max(1, launching.scores_at_once(q) // (batch * heads * tokens))
    ):
        scores = q[:, :, rows].float() @ k.mT * (dim**-0.5 if scale is None else scale)
        weights = (scores - lse[:, :, rows, None]).exp()
        if real is not None:
            weights = torch.where(real[..., rows, None] & real[..., None, :], weights, 0.0)
        onto = weights.new_zeros(*weights.shape[:-1], clusters)
        onto.scatter_add_(-1, plan.key_group[..., None, :].expand_as(weights), weights)
        total.scatter_add_(2, plan.query_group[..., rows, None].expand_as(onto), onto)
    return total


def real_tokens(plan: Plan | ClusterPlan) -> Tensor:
    """Which tokens are no padding, bool ``[B, 1, N]``."""
    return (torch.arange(plan.tokens, device=plan.lengths.device) < plan.lengths[:, None])[:, None]


def _pairs(plan: Plan | ClusterPlan) -> Tensor:
    """Token pairs in every pair of groups, float64 ``[B|1, H|1, Q, K]``."""
    return plan.query_sizes.double()[..., None] * plan.key_sizes.double()[..., None, :]
