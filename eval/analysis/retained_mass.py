"""Attention mass that a plan retains: the softmax mass of the kept keys, by layer and head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dit_sparse import ClusterPlan, Plan, Site


def retained_mass(
    q: Tensor, k: Tensor, plan: Plan | ClusterPlan, rows: int = 256, scale: float | None = None
) -> Tensor:
    """Return the mean share of each head's attention on the keys that a plan keeps, ``[B, H]``.

    Args:
        q, k: ``[B, H, N, D]`` and ``[B, Hkv, N, D]``.
        plan: the sparse plan.
        rows: query rows to measure, evenly spaced over the sequence. Each is computed exactly.
        scale: softmax scale; None: ``D ** -0.5``.
    """
    _, heads, tokens, dim = q.shape
    k = k.repeat_interleave(heads // k.shape[1], 1).float()
    queries = torch.linspace(0, tokens - 1, min(rows, tokens), device=q.device).round().long()
    scores = q[:, :, queries].float() @ k.mT * (dim**-0.5 if scale is None else scale)
    if plan.lengths is not None:
        keys = torch.arange(tokens, device=q.device)
        scores = scores.masked_fill((keys >= plan.lengths[:, None])[:, None, None], -torch.inf)
    return (scores.softmax(-1) * plan.token_mask(queries)).sum(-1).mean(-1)


def at_step(step: int, by_layer: dict[int, Tensor]) -> Callable[[Site, Tensor, Tensor, Plan | ClusterPlan], None]:
    """Return an observer for ``Run.observe`` that stores the retained mass of every layer at one step.

    Args:
        step: the denoising step to measure, from 0.
        by_layer: receives the mass of each layer, ``[H]``, for the first branch of guidance.
    """

    def observer(site: Site, q: Tensor, k: Tensor, plan: Plan | ClusterPlan) -> None:
        if site.step == step and site.layer not in by_layer:
            by_layer[site.layer] = retained_mass(q, k, plan)[0]

    return observer
