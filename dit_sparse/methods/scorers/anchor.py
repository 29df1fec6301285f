"""AnchorAttention: key blocks are kept whose score comes close to the best score of an anchor region.

Source: Y. Zhang et al., "AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity", arXiv:2505.23520,
sec. 3. The anchor a_i of a block of queries is their largest score in a region that is cheap and usually holds the
maximum: the first keys and a local window. A key j (a "stripe") is kept if

    mean(Q_i) . k_j / sqrt(D)  >=  a_i - theta

so that rows with a pronounced maximum keep few keys and flat rows keep many.

Planning: N^2 D / 64 multiply-adds (mean queries of 64, all keys).

Differs from the authors:
- The region is bidirectional: the own frame and its two neighbours, the first frame, and text. In an image, its rows
  take the place of frames. The region consists of whole blocks.
- A plan keeps whole key blocks: a block is kept if any of its keys is, so its score is the largest excess over the
  anchor, max_j mean(Q_i) . k_j / sqrt(D) - a_i. Their kernel gathers single keys, which 16 query blocks share.
- The anchor is that of the mean query, too. Theirs is the mean of the maxima of all queries, which exceeds all scores
  of a mean query where the queries of a block differ, as those of videos do: such rows would keep nothing.
- With a density, theta is solved for each head, and blocks of the region are ranked like all others. Without one they
  are always kept, with theta = 12 in units of log 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ...budget import Above, Budget
from ...grid import Blocks, Grid, Site
from ...method import Scorer
from ...scoring import pool, repeat_last_key, score_in_chunks


@dataclass(frozen=True, kw_only=True)
class Anchor(Scorer):
    """Largest scores of blocks relative to those of an anchor region."""

    default_budget: ClassVar[Budget] = Above(-12 * math.log(2))
    selects_by_head: ClassVar[bool] = True

    def score(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Tensor:
        queries, keys, block = pool(q, site.block) * q.shape[-1] ** -0.5, repeat_last_key(k, site.block), site.block
        region = anchor_region(site.grid, block).to(q.device)

        def score_rows(rows: slice) -> Tensor:
            best = (queries[:, :, rows] @ keys.mT).unflatten(-1, (-1, block)).amax(-1)
            return best - best.masked_fill(~region[rows], -torch.inf).amax(-1, keepdim=True)

        scores = score_in_chunks(score_rows, queries.shape[2], q.shape[0] * q.shape[1] * keys.shape[2])
        return scores if self.density is not None else scores.masked_fill(region, torch.inf)


@lru_cache(maxsize=16)
def anchor_region(grid: Grid, block: int) -> Tensor:
    """Return the key blocks that are in the anchor region of each query block, bool ``[Qb, Qb]``."""
    blocks = Blocks.from_grid(grid, block)
    line = blocks.frame if grid.sides[0] > 1 else blocks.row
    return (line.gap() <= 1) | (line.low == 0) | blocks.text
