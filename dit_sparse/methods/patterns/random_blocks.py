"""Random block-sparse attention: a baseline that any useful method must beat.

Source: the random part of M. Zaheer et al., "Big Bird: Transformers for Longer Sequences", arXiv:2007.14062, sec. 2.

Planning: (N / b)^2 random numbers, once per grid.

Differs from the authors: only random blocks, text and the diagonal are kept, without their window and global tokens.
Every layer and head draws its own blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...density import video_blocks
from ...grid import Site
from ...method import Method
from ...notation.settings import within
from ...plan import Plan, num_blocks


@dataclass(frozen=True, kw_only=True)
class RandomBlocks(Method):
    """The same number of random key blocks for each query block.

    Attributes:
        density: fraction of the query-key pairs to compute; 0.25 if None.
        seed: of the random blocks, which are the same in every step.
    """

    seed: int = within("[0, 4294967296)", 0)

    def plan(self, q, k, v, site: Site, memory: dict) -> Plan:
        grid, block = site.grid, site.block
        blocks = num_blocks(grid.tokens, block)
        generator = torch.Generator().manual_seed(self.seed * 100_003 + site.layer)
        heads, first = q.shape[1], site.first_head or 0
        scores = torch.rand(1, first + heads, blocks, blocks, generator=generator)[:, first:]
        video = video_blocks(grid, block, scores.device)
        pairs = video.pairs(0.25 if self.density is None else self.density)
        keep = video.choose(scores, lambda scores: video.keep_at(scores, pairs))
        return Plan.from_mask(keep, grid.tokens, block).to(q.device)
