"""Random block-sparse attention: a baseline that any useful method must beat.

Source: the random part of M. Zaheer et al., "Big Bird: Transformers for Longer Sequences", arXiv:2007.14062, sec. 2.

Differs from the authors: only random blocks, text and the diagonal are kept, without their window and global tokens.
Every layer and head draws its own blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..budget import Top
from ..grid import Blocks, Site
from ..method import Method, required_blocks
from ..plan import Plan, num_blocks


@dataclass(frozen=True, kw_only=True)
class RandomBlocks(Method):
    """The same number of random key blocks for each query block.

    Attributes:
        density: fraction of the query-key pairs to compute.
        seed: of the random blocks, which are the same in every step.
    """

    density: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density is None:
            raise ValueError("random_blocks needs a density, for example density=0.25")

    def plan(self, q, k, site: Site, memory: dict) -> Plan:
        grid, block = site.grid, site.block
        blocks = num_blocks(grid.tokens, block)
        generator = torch.Generator().manual_seed(self.seed * 100_003 + site.layer)
        scores = torch.rand(1, q.shape[1], blocks, blocks, generator=generator)
        scores = scores.masked_fill(required_blocks(Blocks.from_grid(grid, block)), torch.inf)
        return Plan.from_mask(Top(self.density).keep(scores), grid.tokens, block).to(q.device)
