"""XAttention: block scores from sums along the antidiagonals of the score map.

Source: R. Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring", arXiv:2503.16428, sec. 2. Every S
x S tile of the score map is represented by its antidiagonal, which crosses each of its vertical and slanted lines. With
the tokens of a tile concatenated, those of the queries in reverse,

    a_ij = (1 / (S sqrt(D))) sum_t  q[iS + S - 1 - t] . k[jS + t]

is one product of N/S rows of length S D, 1/S of the work of q k^T. The softmax of its rows, summed over the tiles of a
block, is the score of the block. Every row keeps the fewest blocks that reach the threshold.

Planning: N^2 D / 8 multiply-adds (an antidiagonal of every tile of 8 x 8).

Differs from the authors: sequences may have any length (tokens beyond the end are zeros, and tiles of such tokens alone
are ignored); text and the diagonal are kept, as by every method here. S = 8 and a threshold of .9 are their settings
for HunyuanVideo.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...budget import Budget, Mass
from ...grid import Site
from ...method import Scorer
from ...notation.settings import POWER_OF_TWO, within
from ...scoring import score_in_chunks, split_blocks


@dataclass(frozen=True, kw_only=True)
class XAttention(Scorer):
    """Antidiagonal scores.

    Attributes:
        stride: S, side of a tile in tokens: a power of two that divides the block.
    """

    default_budget: ClassVar[Budget] = Mass(0.9)
    stride: int = within(POWER_OF_TWO, 8)

    def score(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Tensor:
        tokens, dim = q.shape[2:]
        if site.block % self.stride:
            raise ValueError(f"stride must divide the block of {site.block}, got {self.stride}")
        queries, keys = (split_blocks(x, site.block).unflatten(3, (-1, self.stride)) for x in (q, k))
        queries, keys = queries.flip(-2).flatten(-2), keys.flatten(-2)  # [B, H, Qb, tiles, S * D]
        blocks, tiles = keys.shape[2:4]
        valid = torch.arange(blocks * tiles, device=q.device) * self.stride < tokens

        def score_rows(rows: slice) -> Tensor:
            logits = queries[:, :, rows].flatten(2, 3) @ keys.flatten(2, 3).mT / (self.stride * dim**0.5)
            weights = logits.masked_fill(~valid, -torch.inf).softmax(-1)
            weights = weights * valid.view(blocks, tiles)[rows].flatten()[:, None]
            return weights.unflatten(-1, (blocks, tiles)).sum(-1).unflatten(2, (-1, tiles)).sum(3)

        return score_in_chunks(score_rows, blocks, q.shape[0] * q.shape[1] * tiles**2 * blocks).log()
