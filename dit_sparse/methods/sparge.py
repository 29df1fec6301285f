"""SpargeAttn: block means predict the attention map, where a block is alike enough for a mean to speak for it.

Source: J. Zhang et al., "SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference", arXiv:2502.18137,
sec. 3.2-3.3. A block's self-similarity is the mean cosine between its tokens. Key blocks that are alike compete by

    softmax_j(mean(Q_i) . mean(K_j) / sqrt(D))

and those that are not, as rows and as columns, are computed anyway. Tokens stand along a Hilbert curve (sec. 3.7),
which makes blocks alike.

Differs from the authors: the first of their two filters only; the second skips products inside a computed block, and
8-bit products are a kernel's business. One block size for queries and keys (they: 128 and 64). By default nothing is
forced, as in the rule they recommend (top-k with a threshold of -0.1, below what a mean cosine can be), so that a
density is met.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import order
from ..grid import Grid, Site
from ..method import Scorer
from ..scoring import pool


@dataclass(frozen=True, kw_only=True)
class Sparge(Scorer):
    """Products of block means.

    Attributes:
        similarity: blocks whose tokens have a mean cosine below this are computed anyway; 0: none is.
        curve: cut the blocks along a Hilbert curve.
    """

    similarity: float = 0.0
    curve: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.similarity <= 1:
            raise ValueError(f"similarity is a mean cosine between 0 and 1, not {self.similarity}")

    def order(self, grid: Grid, block: int) -> Tensor | None:
        return order.hilbert(grid) if self.curve else None

    def score(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Tensor:
        scores = pool(q, site.block) @ pool(k, site.block).mT * q.shape[-1] ** -0.5
        anyway = [self_similarity(x, site.block) < self.similarity for x in (q, k)]
        return scores.masked_fill(anyway[0][..., None] | anyway[1][..., None, :], torch.inf)


def self_similarity(x: Tensor, block: int) -> Tensor:
    """Mean cosine between the tokens of each block, themselves counted in: ``[B, H, N, D] -> [B, H, Qb]``. It is the
    square of the length of the mean of the tokens' directions."""
    directions = pool(F.normalize(x.float(), dim=-1), block)
    return directions.square().sum(-1)
