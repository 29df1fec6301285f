"""How much of the attention a plan keeps: the softmax mass of the kept keys, per layer and head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dit_sparse import ClusterPlan, Plan, Site


def retained_mass(
    q: Tensor, k: Tensor, plan: Plan | ClusterPlan, rows: int = 256, scale: float | None = None
) -> Tensor:
    """Mean share of each head's attention that falls on the plan's keys, ``[B, H]``.

    Measured exactly on ``rows`` query rows spread over the whole sequence of ``q [B, H, N, D]``, ``k [B, Hkv, N, D]``.
    """
    _, heads, tokens, dim = q.shape
    k = k.repeat_interleave(heads // k.shape[1], 1).float()
    measured_steps = torch.linspace(0, tokens - 1, min(rows, tokens), device=q.device).round().long()
    scores = q[:, :, measured_steps].float() @ k.mT * (dim**-0.5 if scale is None else scale)
    if plan.lengths is not None:
        keys = torch.arange(tokens, device=q.device)
        scores = scores.masked_fill((keys >= plan.lengths[:, None])[:, None, None], -torch.inf)
    return (scores.softmax(-1) * plan.token_mask(measured_steps)).sum(-1).mean(-1)


def at_step(step: int, found: dict[int, Tensor]) -> Callable[[Site, Tensor, Tensor, Plan | ClusterPlan], None]:
    """An observer for ``Run.observe`` that notes the mass ``[H]`` of every layer at one step, the first branch's."""

    def observer(site: Site, q: Tensor, k: Tensor, plan: Plan | ClusterPlan) -> None:
        if site.step == step and site.layer not in found:
            found[site.layer] = retained_mass(q, k, plan)[0]

    return observer
