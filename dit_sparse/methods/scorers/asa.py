"""Adaptive block-sparse attention (ASA, Video-BLADE): block scores from a few sampled tokens of each block.

Source: Y. Gu et al., "Video-BLADE: Block-Sparse Attention Meets Step Distillation for Efficient Video Generation",
arXiv:2508.10774, sec. 3.2. Tokens are ordered along the generalized Hilbert curve. From every block the same few
positions are sampled, for queries and keys. With the scores l_rc between the samples, m_rj the largest score of sample
r in key block j, and m_r its largest score of all,

    s_ij = max over the samples r of block i of  exp(m_rj - m_r)

Each row keeps the fewest blocks that make up 0.95 of its scores, within a minimum and a maximum number.

Planning: N^2 D / 16 multiply-adds (every 4th query and key).

Differs from the authors:
- The positions are drawn once from a fixed seed, not each time, so that equal inputs give equal plans.
- Their branch of pooled keys and values is left out: it counts selected blocks twice, which only their distilled models
  have learned to compensate.
- Their selection leaves out the block that crosses 0.95. Here it is kept. The own block is kept as well and counts in
  the budget.
- Inference only, no distillation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ... import order
from ...budget import Budget, Mass
from ...grid import Grid, Site
from ...method import Scorer
from ...notation.settings import within
from ...plan import num_blocks
from ...scoring import score_in_chunks


@dataclass(frozen=True, kw_only=True)
class ASA(Scorer):
    """Block scores from sampled tokens.

    Attributes:
        samples: tokens sampled from each block; the paper uses 16, its code 32.
        seed: of the sampled positions.
    """

    default_budget: ClassVar[Budget] = Mass(0.95, min_ratio=0.05, max_ratio=0.17)
    samples: int = within("[1, 256]", 16)
    seed: int = within("[0, 4294967296)", 0)

    def order(self, grid: Grid, block: int) -> Tensor:
        return order.gilbert(grid)

    def score(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Tensor:
        tokens, dim = q.shape[2:]
        blocks, samples = num_blocks(tokens, site.block), min(self.samples, site.block)
        within = torch.randperm(site.block, generator=torch.Generator().manual_seed(self.seed))[:samples]
        positions = (torch.arange(blocks)[:, None] * site.block + within).clamp(max=tokens - 1).flatten().to(q.device)
        queries = q[:, :, positions].float().unflatten(2, (blocks, samples)) * dim**-0.5
        # Positions in a block come before blocks, because a maximum over a short last dimension is slow.
        keys = k[:, :, positions.view(blocks, samples).T.flatten()].float()

        def score_rows(rows: slice) -> Tensor:
            logits = queries[:, :, rows].flatten(2, 3) @ keys.mT
            best = logits.unflatten(-1, (samples, blocks)).amax(-2)
            relative = best - best.amax(-1, keepdim=True)
            return relative.unflatten(2, (-1, samples)).amax(3)

        return score_in_chunks(score_rows, blocks, q.shape[0] * q.shape[1] * samples**2 * blocks)
