"""Attention mass that a plan retains, and upper bounds on it for masks of the same cost.

With M_ij the share of a head's attention in the pair (i, j) of query group and key group, w_ij the token pairs in it,
and W the token pairs that a plan computes for this head:

    best            max sum t_ij M_ij  subject to  sum t_ij w_ij <= W  and  0 <= t_ij <= 1,  over the plan's own
                    groups: blocks of its own token order, or its own clusters
    best_by_row     the same, with the plan's own number of token pairs in every row of groups
    best_row_major  the same as best, over blocks of the row-major token order, independent of the plan's groups

Fractional t makes the first two true upper bounds where groups differ in size; where all groups are equal, they are the
masses of a mask. Hence retained <= best_by_row <= best. The third bound is common to all methods; another order or
clusters can exceed it. Text blocks and diagonal blocks are part of every bound over blocks: those that the plan keeps
in the first two, all of them in the third, as far as W allows. Masses are exact: they use the log-sum-exp of the dense
call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse import ClusterPlan, Plan, Site
from dit_sparse.grid import Blocks
from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.planning.block_mass import block_mass
from dit_sparse.method import AttentionOutput, required_blocks


def retained_and_bounds(
    dense: AttentionOutput, plan: Plan | ClusterPlan, site: Site, row_major_mass: Tensor
) -> dict[str, Tensor]:
    """Return the mass that a plan retains of a dense call, and its upper bounds, float64 ``[B, H]`` each.

    Args:
        dense: the call computed with a full plan of row-major blocks, with its log-sum-exp.
        plan: the sparse plan of the same call.
        site: grid and block size of the call.
        row_major_mass: `group_mass` of the dense call, ``[B, H, Qb, Qb]``.
    """
    has_own_groups = isinstance(plan, ClusterPlan) or plan.order is not None
    mass = group_mass(dense.q, dense.k, dense.lse, plan, dense.scale) if has_own_groups else row_major_mass
    keep, pairs, row_major_pairs = plan.block_mask(), _token_pairs(plan), _token_pairs(dense.plan)
    # Text tokens keep their places in every order, so the same blocks are required in all of them.
    required = required_blocks(Blocks.from_grid(site.grid, site.block)).to(mass.device)
    kept_required = torch.zeros_like(keep) if isinstance(plan, ClusterPlan) else keep & required
    row_budget = (pairs * keep).sum(-1)
    budget = row_budget.sum(-1)
    return {
        "retained": (mass * keep).sum((-2, -1)),
        "best": max_mass(mass.flatten(2), pairs.flatten(2), budget, kept_required.flatten(2)),
        "best_by_row": max_mass(mass, pairs, row_budget, kept_required).sum(-1),
        "best_row_major": max_mass(row_major_mass.flatten(2), row_major_pairs.flatten(2), budget, required.flatten()),
    }


def max_mass(mass: Tensor, pairs: Tensor, budget: Tensor, required: Tensor) -> Tensor:
    """Return the largest mass that fits into a budget of token pairs, ``[...]``: a fractional knapsack.

    Args:
        mass: mass of every pair of groups, float64 ``[..., P]``.
        pairs: token pairs in each pair of groups; broadcasts to ``mass``.
        budget: token pairs to spend; broadcasts to ``[...]``.
        required: bool, the pairs of groups that are selected first; broadcasts to ``mass``.
    """
    value = (mass / pairs.clamp(min=1)).masked_fill(required, torch.inf)
    rank = value.argsort(-1, descending=True)
    mass, pairs = mass.gather(-1, rank), pairs.expand_as(mass).gather(-1, rank)
    remaining = budget[..., None] - (pairs.cumsum(-1) - pairs)
    return ((remaining / pairs.clamp(min=1)).clamp(0, 1) * mass).sum(-1)


def group_mass(q: Tensor, k: Tensor, lse: Tensor, plan: Plan | ClusterPlan, scale: float | None = None) -> Tensor:
    """Return each head's share of attention in every pair of a plan's groups, kept or not: float64 ``[B, H, Q, K]``.

    The shares of a head sum to 1; all queries that are not padding have equal weight.

    Args:
        q, k: ``[B, H, N, D]`` and ``[B, Hkv, N, D]``.
        lse: log-sum-exp of all scores, ``[B, H, N]``.
        plan: the plan whose groups are used.
        scale: softmax scale; None: ``D ** -0.5``.
    """
    if isinstance(plan, ClusterPlan):
        sums = _cluster_mass(q, k, lse, plan, scale)
    else:
        sums = block_mass(q, k, lse, plan.block, order=plan.order, lengths=plan.lengths, scale=scale)
    queries = plan.query_sizes.double()
    if plan.lengths is not None:
        lead = (*q.shape[:2], -1)
        real = real_tokens(plan).double().expand(lead)
        queries = real.new_zeros(queries.expand(lead).shape).scatter_add_(-1, plan.query_group.expand(lead), real)
    row_shares = sums.double() / sums.sum(-1, keepdim=True, dtype=torch.float64).clamp(min=1e-30)
    return row_shares * (queries / queries.sum(-1, keepdim=True))[..., None]


def _cluster_mass(q: Tensor, k: Tensor, lse: Tensor, plan: ClusterPlan, scale: float | None) -> Tensor:
    """Sum of attention weights between query clusters and key clusters, float32 ``[B, H, Cq, Ck]``."""
    (batch, heads, tokens, dim), clusters = q.shape, plan.key_sizes.shape[-1]
    k = k.repeat_interleave(heads // k.shape[1], 1).float()
    real = None if plan.lengths is None else real_tokens(plan)
    total = torch.zeros(batch, heads, plan.query_sizes.shape[-1], clusters, device=q.device)
    rows_at_once = max(1, launching.chunk_elements(q) // (batch * heads * tokens))
    for rows in torch.arange(tokens, device=q.device).split(rows_at_once):
        scores = q[:, :, rows].float() @ k.mT * (dim**-0.5 if scale is None else scale)
        weights = (scores - lse[:, :, rows, None]).exp()
        if real is not None:
            weights = torch.where(real[..., rows, None] & real[..., None, :], weights, 0.0)
        by_key_cluster = weights.new_zeros(*weights.shape[:-1], clusters)
        by_key_cluster.scatter_add_(-1, plan.key_group[..., None, :].expand_as(weights), weights)
        total.scatter_add_(2, plan.query_group[..., rows, None].expand_as(by_key_cluster), by_key_cluster)
    return total


def real_tokens(plan: Plan | ClusterPlan) -> Tensor:
    """Return the mask of tokens that are not padding, bool ``[B, 1, N]``."""
    return (torch.arange(plan.tokens, device=plan.lengths.device) < plan.lengths[:, None])[:, None]


def _token_pairs(plan: Plan | ClusterPlan) -> Tensor:
    """Token pairs in every pair of groups, float64 ``[B|1, H|1, Q, K]``."""
    return plan.query_sizes.double()[..., None] * plan.key_sizes.double()[..., None, :]
