"""Sol-Attn: exact attention for blocks with outstanding scores, one pooled term for each other block.

Source: "Sol-Attn", arXiv:2607.24027, and its reference implementation. With the mean c_i of query block i and the mean
m_j of key block j, centred over j (which leaves a softmax unchanged),

    s_ij = c_i . m_j / sqrt(D)        exact if s_ij > tau sqrt(sum_d c_id^2 var_d / D)

where var_d is the variance of channel d of the block means: tau is a threshold in standard deviations of the scores of
a row. The diagonal and its two neighbours are exact, too. Every other block j adds n_j exp(s_ij + q . m / sqrt(D)) to
the softmax denominator of each query q of block i, with the mean m of all keys, and this times its mean value to the
numerator. An offset of all keys therefore does not change the result, as in attention. A tau of 1, 1.5 and 2 keeps
about 16, 7 and 3 %.

Planning: N^2 D / 4096 multiply-adds (means of 64 tokens), and twice as many in every call for the pooled terms.

Differs from the authors: text is kept, as by every method here, in place of their sinks; ``density`` keeps the same
number of best blocks in every row; single tokens, which theirs can add, are left out. `Pooled` computes the pooled
terms for each query instead of each query block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...budget import Above, Budget
from ...grid import Grid, Site
from ...kernels.tail import merge_attention
from ...method import AttentionOutput, Scorer
from ...plan import num_blocks
from ...scoring import pool, split_blocks, without_padding


@dataclass(frozen=True, kw_only=True)
class Sol(Scorer):
    """Threshold on standardized block scores, and pooled terms for the other blocks.

    Attributes:
        budget: by default ``Above(1.3)``, the tau of their released node.
    """

    default_budget: ClassVar[Budget] = Above(1.3)
    needs_lse: ClassVar[bool] = True

    def required(self, grid: Grid, block: int) -> Tensor:
        position = torch.arange(num_blocks(grid.tokens, block))
        return super().required(grid, block) | _adjacent(position)

    def score(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Tensor:
        queries, keys = pool(q, site.block), pool(k, site.block)
        keys = keys - keys.mean(2, keepdim=True)
        deviation = (queries.square() @ keys.square().mean(2)[..., None]).sqrt()
        scores = queries @ keys.mT / deviation.clamp(min=1e-12)
        position = torch.arange(scores.shape[-1], device=q.device)
        return scores.masked_fill(_adjacent(position), torch.inf)

    def correct(self, result: AttentionOutput, site: Site, memory: dict) -> tuple[Tensor, Tensor]:
        plan, block = result.plan, result.plan.block
        heads, tokens, dim = result.q.shape[1:]
        scale = dim**-0.5 if result.scale is None else result.scale
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (result.k, result.v))
        size = _block_sizes(tokens, plan.lengths, block, k.device)[:, None, :, None]
        queries, keys, values = (_block_means(x, size, plan.lengths, block) for x in (result.q, k, v))
        mean_key = (keys * size).sum(2, keepdim=True) / size.sum(2, keepdim=True)
        logits = queries @ (keys - mean_key).mT * scale + size.log().mT
        logits = logits.masked_fill(plan.block_mask(), -torch.inf)
        lse = logits.logsumexp(-1)
        out = (logits - lse.nan_to_num(neginf=0.0)[..., None]).exp() @ values
        to_tokens = lambda x: x.repeat_interleave(block, 2)[:, :, :tokens]
        offset = (result.q.float() @ mean_key.mT)[..., 0] * scale
        out, lse = merge_attention(result.out, result.lse, to_tokens(out), to_tokens(lse) + offset)
        return out.to(result.out.dtype), lse


def _adjacent(position: Tensor) -> Tensor:
    return (position[:, None] - position).abs() <= 1


def _block_sizes(tokens: int, lengths: Tensor | None, block: int, device: torch.device) -> Tensor:
    """Return the tokens of every block without padding, float32 ``[B|1, Qb]``."""
    starts = torch.arange(num_blocks(tokens, block), device=device) * block
    end = torch.full((1,), tokens, device=device) if lengths is None else lengths
    return (end[:, None] - starts).clamp(0, block).float()


def _block_means(x: Tensor, size: Tensor, lengths: Tensor | None, block: int) -> Tensor:
    """Return the mean of every block of ``x [B, H, N, D]`` without padding, ``[B, H, Qb, D]``; 0 if it is empty."""
    if lengths is not None:
        x = without_padding(x, lengths)
    return split_blocks(x, block).sum(3) / size.clamp(min=1)
