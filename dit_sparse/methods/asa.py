"""Adaptive block-sparse attention (ASA): a few tokens sampled from every block find where attention goes.

Source: Y. Gu et al., "Video-BLADE: Block-Sparse Attention Meets Step Distillation for Efficient Video Generation",
arXiv:2508.10774, sec. 3.2. Tokens stand along the generalised Hilbert curve. From every block the same few places are
sampled, of queries and of keys alike, and with l_rc the scores between the samples, m_rj the best of sample r in key
block j and m_r the best of all,

    s_ij = max over the samples r of block i of  exp(m_rj - m_r)

The fewest blocks that make up .95 of a row's scores are kept, between a least and a greatest number.

Differs from the authors: the places are drawn once from a fixed seed, not anew each time, so that equal inputs give
equal plans. Their branch of pooled keys and values counts selected blocks twice, which their students learn to live
with; it is not part of the method here. Inference only: no distillation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import order
from ..budget import Budget, Mass
from ..grid import Grid, Site
from ..method import Scorer
from ..plan import num_blocks
from ..scoring import score_in_chunks


@dataclass(frozen=True, kw_only=True)
class ASA(Scorer):
    """Scores of sampled tokens.

    Attributes:
        samples: tokens that are sampled from each block (the paper: 16, its code: 32).
        seed: of the places.
    """

    default_budget: ClassVar[Budget] = Mass(0.95, least=0.05, most=0.17)
    samples: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise ValueError(f"samples is how many tokens of a block are looked at, at least 1, not {self.samples}")

    def order(self, grid: Grid, block: int) -> Tensor:
        return order.gilbert(grid)

    def score(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Tensor:
        tokens, dim = q.shape[2:]
        blocks, samples = num_blocks(tokens, site.block), min(self.samples, site.block)
        within = torch.randperm(site.block, generator=torch.Generator().manual_seed(self.seed))[:samples]
        places = (torch.arange(blocks)[:, None] * site.block + within).clamp(max=tokens - 1).flatten().to(q.device)
        queries, keys = (x[:, :, places].float().unflatten(2, (blocks, samples)) for x in (q, k))

        def best(part: slice) -> Tensor:
            logits = queries[:, :, part].flatten(2, 3) @ keys.flatten(2, 3).mT * dim**-0.5
            of_block = logits.unflatten(-1, (blocks, samples)).amax(-1)
            relative = of_block - of_block.amax(-1, keepdim=True)
            return relative.unflatten(2, (-1, samples)).amax(3)

        return score_in_chunks(best, blocks, q.shape[0] * q.shape[1] * samples**2 * blocks)
