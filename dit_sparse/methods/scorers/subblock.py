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
        means = [pool(x, size) for x in (q, k)]
        missing = -means[0].shape[2] % n
        queries, keys = (F.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, n)) for x in means)
        blocks = keys.shape[2]
        sizes = (tokens - torch.arange(blocks * n, device=q.device) * size).clamp(0, size)
        log_sizes = sizes.float().log()  # -inf for empty sub-blocks

        def score_rows(rows: slice) -> Tensor:
            logits = queries[:, :, rows].flatten(2, 3) @ keys.flatten(2, 3).mT * dim**-0.5
            logits = logits + log_sizes.view(blocks, n)[rows].flatten()[:, None] + log_sizes
            return logits.unflatten(-1, (blocks, n)).logsumexp(-1).unflatten(2, (-1, n)).logsumexp(3)

        return score_in_chunks(score_rows, blocks, q.shape[0] * q.shape[1] * n**2 * blocks)
