"""Sol: blocks that stand out are exact, all others are one pooled term each in the same softmax.

Source: "Sol-Attn", arXiv:2607.24027, and its reference implementation. With query block i as its mean c_i, key block j
as its mean m_j, and the block means centred over j (a softmax does not notice),

    s_ij = c_i . m_j / sqrt(D)        exact where s_ij > tau sqrt(sum_d c_id^2 var_d / D),

var_d being the variance of channel d of the block means: a threshold in standard deviations of the row's own scores.
The block itself and its two neighbours are exact too. A block that is not adds n_j exp(s_ij) to the denominator of all
queries of block i, and that times its mean value to the numerator. tau 1, 1.5 and 2 keep some 16, 7 and 3 %.

Differs from the authors: text is kept as everywhere here, in the place of their sinks; ``density`` keeps the same
number of blocks in every row, the best ones; they can also add single tokens. `Pooled` does the same for every query by
itself.
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
    """A threshold on standardised block scores, and a pooled tail.

    Attributes:
        budget: by default ``Above(1.3)``, as their released node.
    """

    default_budget: ClassVar[Budget] = Above(1.3)
    needs_lse: ClassVar[bool] = True

    def score(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Tensor:
        queries, keys = pool(q, site.block), pool(k, site.block)
        keys = keys - keys.mean(2, keepdim=True)
        deviation = (queries.square() @ keys.square().mean(2)[..., None]).sqrt()
        scores = queries @ keys.mT / deviation.clamp(min=1e-12)
        place = torch.arange(scores.shape[-1], device=q.device)
        return scores.masked_fill((place[:, None] - place).abs() <= 1, torch.inf)

    def correct(self, done: AttentionOutput, site: Site, memory: dict) -> tuple[Tensor, Tensor]:
        plan, block = done.plan, done.plan.block
        heads, tokens, dim = done.q.shape[1:]
        scale = dim**-0.5 if done.scale is None else done.scale
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (done.k, done.v))
        size, keys, values = _means(k, v, plan.lengths, block)
        logits = pool(done.q, block) @ keys.mT * scale + size.log()[:, None, None]
        logits = logits.masked_fill(plan.block_mask(), -torch.inf)
        lse = logits.logsumexp(-1)
        tail = (logits - lse.nan_to_num(neginf=0.0)[..., None]).exp() @ values
        each = lambda x: x.repeat_interleave(block, 2)[:, :, :tokens]
        out, lse = merge_attention(done.out, done.lse, each(tail), each(lse))
        return out.to(done.out.dtype), lse


def _means(k: Tensor, v: Tensor, lengths: Tensor | None, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Size ``[B|1, Qb]``, mean key and mean value ``[B, H, Qb, D]`` of every block, padding left out."""
    tokens = k.shape[2]
    starts = torch.arange(-(-tokens // block), device=k.device) * block
    if lengths is None:
        return (tokens - starts).clamp(max=block).float()[None], pool(k, block), pool(v, block)
    full = (tokens - starts).clamp(max=block)
    size = (lengths[:, None] - starts).clamp(min=0).minimum(full).float()
    real = (torch.arange(tokens, device=k.device) < lengths[:, None])[:, None, :, None]
    share = (full / size.clamp(min=1))[:, None, :, None]
    return size, pool(k * real, block) * share, pool(v * real, block) * share
