"""Sub-block scores: the attention between two blocks, estimated from a few means within each block.

Source: the backend "subblock_sparse" of SGLang's diffusion engine, https://github.com/sgl-project/sglang. Blocks are
cut into n sub-blocks. With the sub-block means a of a query block and b of a key block,

    s_ij = log sum_a sum_b exp(a . b / sqrt(D))

is the log of the attention mass that the means predict. Every row keeps its best blocks.

Planning: N^2 D / 256 multiply-adds (means of 16 tokens).

Differs from the authors: sub-blocks of a shorter last block are weighted by their number of tokens, and scores are
float32, because the authors found that ties in bfloat16 favour early blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...grid import Site
from ...method import Scorer
from ...notation.settings import POWER_OF_TWO, within
from ...scoring import pool, score_in_chunks


@dataclass(frozen=True, kw_only=True)
class SubBlock(Scorer):
    """Log-sum-exp over sub-block means.

    Attributes:
        subblocks: n, sub-blocks of a block: a power of two that divides the block.
    """

    subblocks: int = within(POWER_OF_TWO, 4)

    def score(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Tensor:
        (tokens, dim), n = q.shape[2:], self.subblocks
        if site.block % n:
            raise ValueError(f"subblocks must divide the block of {site.block}, got {n}")
        size = site.block // n
        # Positions in a block come before blocks, because reductions over a short last dimension are slow.
        queries, keys = (_by_position(pool(x, size), n) for x in (q * dim**-0.5, k))
        blocks = keys.shape[3]
        sizes = (tokens - torch.arange(blocks * n, device=q.device) * size).clamp(0, size)
        log_sizes = sizes.float().log().view(blocks, n).T  # -inf for empty sub-blocks

        def score_rows(rows: slice) -> Tensor:
            logits = queries[:, :, :, rows].flatten(2, 3) @ keys.flatten(2, 3).mT
            logits = logits.unflatten(-1, (n, blocks)).unflatten(2, (n, -1))
            logits[..., -1] += log_sizes[:, -1] - log_sizes[:, 0]  # only the last block may be shorter
            if rows.stop == blocks:
                logits[:, :, :, -1] += (log_sizes[:, -1] - log_sizes[:, 0])[:, None, None]
            greatest = logits.amax(2).amax(3)
            total = logits.sub_(greatest[:, :, None, :, None]).exp_().sum(2).sum(3)
            return total.log_() + greatest + 2 * log_sizes[0, 0]

        return score_in_chunks(score_rows, blocks, q.shape[0] * q.shape[1] * n**2 * blocks)


def _by_position(means: Tensor, n: int) -> Tensor:
    """Return the means of the n sub-blocks of every block, ``[B, H, Qb * n, D] -> [B, H, n, Qb, D]``; 0 if empty."""
    return F.pad(means, (0, 0, 0, -means.shape[2] % n)).unflatten(2, (-1, n)).transpose(2, 3)
