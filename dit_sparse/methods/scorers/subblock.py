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

import math
from dataclasses import dataclass

from torch import Tensor

from ...grid import Site
from ...method import Scorer
from ...notation.settings import POWER_OF_TWO, within
from ...scoring import log_share_of_last_subblocks, score_in_chunks, subblock_means


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
        queries, keys = (subblock_means(x, site.block, n) for x in (q, k))
        queries, blocks = queries * dim**-0.5, keys.shape[3]
        last = log_share_of_last_subblocks(tokens, site.block, n, q.device)

        def score_rows(rows: slice) -> Tensor:
            logits = queries[:, :, :, rows].flatten(2, 3) @ keys.flatten(2, 3).mT
            logits = logits.unflatten(-1, (n, blocks)).unflatten(2, (n, -1))
            logits[..., -1] += last
            if rows.stop == blocks:
                logits[:, :, :, -1] += last[:, None, None]
            greatest = logits.amax(2).amax(3)
            total = logits.sub_(greatest[:, :, None, :, None]).exp_().sum(2).sum(3)
            return total.log_() + greatest + 2 * math.log(site.block // n)

        return score_in_chunks(score_rows, blocks, q.shape[0] * q.shape[1] * n**2 * blocks)
