"""Sol-Attn: exact attention for blocks with outstanding scores, one pooled term for each other block.

Source: "Sol-Attn", arXiv:2607.24027, and its reference implementation. With the mean c_i of query block i and the mean
m_j of key block j, centred over j (which leaves a softmax unchanged),

    s_ij = c_i . m_j / sqrt(D)        exact if s_ij > tau sqrt(sum_d c_id^2 var_d / D)

where var_d is the variance of channel d of the block means: tau is a threshold in standard deviations of the scores of
a row. The diagonal and its two neighbours are exact, too. Every other block j adds n_j exp(s_ij) to the softmax
denominator of all queries of block i, and this times its mean value to the numerator. A tau of 1, 1.5 and 2 keeps about
16, 7 and 3 %.

Differs from the authors: text is kept, as by every method here, in place of their sinks; ``density`` keeps the same
number of best blocks in every row; single tokens, which theirs can add, are left out. `Pooled` computes the pooled
terms for each query instead of each query block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import Above, Budget
from ..grid import Site
from ..method import AttentionOutput, Scorer
from ..scoring import merge_attention, pool


@dataclass(frozen=True, kw_only=True)
class Sol(Scorer):
    """Threshold on standardized block scores, and pooled terms for the other blocks.

    Attributes:
        budget: by default ``Above(1.3)``, the tau of their released node.
    """

    default_budget: ClassVar[Budget] = Above(1.3)
    needs_lse: ClassVar[bool] = True

    def score(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Tensor:
        queries, keys = pool(q, site.block), pool(k, site.block)
        keys = keys - keys.mean(2, keepdim=True)
        deviation = (queries.square() @ keys.square().mean(2)[..., None]).sqrt()
        scores = queries @ keys.mT / deviation.clamp(min=1e-12)
        position = torch.arange(scores.shape[-1], device=q.device)
        return scores.masked_fill((position[:, None] - position).abs() <= 1, torch.inf)

    def correct(self, result: AttentionOutput, site: Site, memory: dict) -> tuple[Tensor, Tensor]:
        plan, block = result.plan, result.plan.block
        heads, tokens, dim = result.q.shape[1:]
        scale = dim**-0.5 if result.scale is None else result.scale
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (result.k, result.v))
        size, keys, values = _block_means(k, v, plan.lengths, block)
        logits = pool(result.q, block) @ keys.mT * scale + size.log()[:, None, None]
        logits = logits.masked_fill(plan.block_mask(), -torch.inf)
        lse = logits.logsumexp(-1)
        out = (logits - lse.nan_to_num(neginf=0.0)[..., None]).exp() @ values
        to_tokens = lambda x: x.repeat_interleave(block, 2)[:, :, :tokens]
        out, lse = merge_attention(result.out, result.lse, to_tokens(out), to_tokens(lse))
        return out.to(result.out.dtype), lse


def _block_means(k: Tensor, v: Tensor, lengths: Tensor | None, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return size ``[B|1, Qb]``, mean key and mean value ``[B, H, Qb, D]`` of every block, without padding."""
    tokens = k.shape[2]
    starts = torch.arange(-(-tokens // block), device=k.device) * block
    full = (tokens - starts).clamp(max=block)
    if lengths is None:
        return full.float()[None], pool(k, block), pool(v, block)
    size = (lengths[:, None] - starts).clamp(min=0).minimum(full).float()
    valid = (torch.arange(tokens, device=k.device) < lengths[:, None])[:, None, :, None]
    rescale = (full / size.clamp(min=1))[:, None, :, None]
    return size, pool(k * valid, block) * rescale, pool(v * valid, block) * rescale
