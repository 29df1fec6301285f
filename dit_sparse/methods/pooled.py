"""Pooled: what a plan drops is not forgotten but seen from afar, a group of keys as one.

Source: H. Ren et al., "Combiner: Full Attention Transformer with Sparse Computation Cost", arXiv:2107.05768, whose
direct and pooled regions share one softmax; the global branch of Video-BLADE (P. Gu et al., arXiv:2508.10774) is a
relative. A dropped group j of n keys with mean m joins the softmax of query q as

    logit  q.m / sqrt(D) + log n,        value  the mean of its values.

The mean of exponentials exceeds the exponential of the mean, so this is too little. ``variance`` adds the second
cumulant, (q^2 . s) / 2D with the variance s of each channel. That is right for keys spread like a Gaussian, and far too
much for the concentrated heads of the bundled model: `svg` at density .25 had 28.4 dB there, 29.9 with pooled groups,
and 19.5 with the variance. So it is not the default.

Differs from the authors: nothing is trained, only dropped groups are pooled (BLADE pools all, and so counts the kept
ones twice). The kept part and the pooled one are merge_attention by their log-sum-exps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..clusters import ClusterPlan
from ..composition import Correction
from ..grid import Site
from ..method import AttentionOutput, Method
from ..plan import Plan
from ..scoring import SCORES_PER_CHUNK, merge_attention
from .radial import Radial

USUAL = Radial()


@dataclass(frozen=True, kw_only=True)
class Pooled(Correction):
    """A correction around any plan, for blocks and clusters alike. Costs two products a query and group.

    Attributes:
        variance: whether the variance of the keys in a group counts.
    """

    inner: Method = USUAL
    variance: bool = False

    def correct(self, done: AttentionOutput, site: Site, memory: dict) -> tuple[Tensor, Tensor]:
        q, plan = done.q.float(), done.plan
        heads, tokens, dim = q.shape[1:]
        scale = dim**-0.5 if done.scale is None else done.scale
        k, v = (x.repeat_interleave(heads // x.shape[1], 1).float() for x in (done.k, done.v))
        size, mean = _pooled(plan, k.shape[:2], k.device)
        key, value = mean(k), mean(v)
        spread = (mean(k.square()) - key.square()).clamp(min=0) if self.variance else None
        keep, row = plan.block_mask(), plan.query_group
        parts = []
        for some in torch.arange(tokens, device=q.device).split(max(1, SCORES_PER_CHUNK // size.numel())):
            logits = q[:, :, some] @ key.mT * scale + size.log()[:, :, None]
            if self.variance:
                logits += q[:, :, some].square() @ spread.mT * (scale**2 / 2)
            logits = logits.masked_fill(torch.take_along_dim(keep, row[..., some, None], 2), -torch.inf)
            lse = logits.logsumexp(-1)
            parts.append(((logits - lse.nan_to_num(neginf=0.0)[..., None]).exp() @ value, lse))
        out, lse = merge_attention(done.out, done.lse, *(torch.cat(part, 2) for part in zip(*parts, strict=True)))
        return out.to(done.out.dtype), lse


def _pooled(
    plan: Plan | ClusterPlan, lead: torch.Size, device: torch.device
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Tokens in every group of keys, ``[B, H, G]``, and a function that takes the mean over each: ``x [B, H, N, D]`` to
    ``[B, H, G, D]``. Padding belongs to no group; an empty one has size 0 and mean 0."""
    groups = plan.key_sizes.shape[-1]
    weight = torch.ones(1, plan.tokens, device=device)
    if plan.lengths is not None:
        weight = (torch.arange(plan.tokens, device=device) < plan.lengths[:, None]).float()
    weight, label = weight[:, None].expand(*lead, -1), plan.key_group.expand(*lead, -1)
    size = weight.new_zeros(*lead, groups).scatter_add_(2, label, weight)

    def mean(x: Tensor) -> Tensor:
        total = x.new_zeros(*lead, groups, x.shape[-1])
        total.scatter_add_(2, label[..., None].expand_as(x), x * weight[..., None])
        return total / size.clamp(min=1)[..., None]

    return size, mean
