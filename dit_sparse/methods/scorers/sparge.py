"""SpargeAttn: block scores from mean queries and keys along a Hilbert curve, with dissimilar blocks always kept.

Source: J. Zhang et al., "SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference", arXiv:2502.18137,
sec. 3.2-3.3. The self-similarity of a block is the mean cosine between its tokens. Blocks with a high self-similarity
are represented by their means; key blocks j are scored by

    softmax_j(mean(Q_i) . mean(K_j) / sqrt(D))

Rows and columns of blocks with a low self-similarity are always computed, in addition to the budget. The mean of all
keys is subtracted first, which changes no softmax. Tokens are ordered along a Hilbert curve (sec. 3.7), which increases
the self-similarity of blocks.

Planning: N^2 D / 4096 multiply-adds (means of 64 tokens).

Differs from the authors:
- Only the first of their two filters. The second filter, which skips products inside a computed block, and their 8-bit
  products are parts of the kernel.
- A mass budget keeps the block that crosses it, which theirs leaves out. The own block is kept and counts in the
  budget.
- One block size for queries and keys; theirs are 128 and 64.
- By default no block counts as dissimilar, so that a density is met. This is also the setting they recommend: top-k
  with a threshold of -0.1, which no mean cosine reaches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import order
from ...grid import Grid, Site
from ...method import Scorer
from ...notation.settings import within
from ...scoring import pool


@dataclass(frozen=True, kw_only=True)
class Sparge(Scorer):
    """Products of block means.

    Attributes:
        similarity_threshold: blocks with a self-similarity below this are always computed; 0: none.
        hilbert: whether blocks are cut along a Hilbert curve.
    """

    similarity_threshold: float = within("[0, 1]", 0.0)
    hilbert: bool = True

    @property
    def density_exception(self) -> str | None:
        return "dissimilar blocks are always computed" if self.similarity_threshold else None

    def order(self, grid: Grid, block: int) -> Tensor | None:
        return order.hilbert(grid) if self.hilbert else None

    def score(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Tensor:
        scores = pool(q, site.block) @ pool(k, site.block).mT * q.shape[-1] ** -0.5
        if not self.similarity_threshold:
            return scores
        k = k - k.mean(2, keepdim=True)
        rows, columns = (self_similarity(x, site.block) < self.similarity_threshold for x in (q, k))
        return scores.masked_fill(rows[..., None] | columns[..., None, :], torch.inf)


def self_similarity(x: Tensor, block: int) -> Tensor:
    """Return the mean cosine between all pairs of tokens of each block, ``[B, H, N, D] -> [B, H, Qb]``.

    It equals the squared length of the mean of the normalized tokens.
    """
    directions = pool(F.normalize(x.float(), dim=-1), block)
    return directions.square().sum(-1)
