"""NOSA: one part of the key blocks is chosen for each row, the other by a ranking that all rows and steps share.

Source: Y. Huang et al., "NOSA: Native and Offloadable Sparse Attention", arXiv:2510.13602. Reconstructed from the
abstract: both scores and their proportion are ours. Every row keeps two kinds of key blocks,

    k = k_aware + k_agnostic

the best ones for its own queries, and those that a ranking independent of the queries puts first, the same for all
rows. These stay the same, so that their keys need not be transferred again.

Planning: N^2 D / 4096 multiply-adds (means of 64 tokens), and 64 N D once per generation.

Differs from the authors:
- Theirs is trained with the model. Here, the ranking is the attention that key blocks receive from a few queries of the
  first plan of a generation, kept to its end. The other blocks are chosen at each plan, by the products of block means.
- The own block is kept and counts in the budget.
- Without a density, 25 % of the pairs are kept; their budget is a number of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...density import video_blocks
from ...grid import Site
from ...kernels.planning.selection import select_top
from ...method import Method
from ...notation.settings import within
from ...plan import Plan
from ...scoring import pool, sampled_attention


@dataclass(frozen=True, kw_only=True)
class NOSA(Method):
    """Query-aware and query-agnostic blocks.

    Attributes:
        density: without one, 0.25.
        agnostic: part of the kept blocks, without the own one, that is query-agnostic.
        samples: number of random queries of the agnostic ranking.
        seed: of the sample.
    """

    agnostic: float = within("[0, 1]", 0.25)
    samples: int = within("[1, 10000]", 64)
    seed: int = within("[0, 4294967296)", 0)

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Plan:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        if "received" not in memory:
            _, weights = sampled_attention(q, k, site.grid, self.samples, self.seed)
            memory["received"] = pool(weights.mean(2)[..., None], site.block)[..., 0]
        blocks = video_blocks(site.grid, site.block, q.device)
        pairs = blocks.pairs(0.25 if self.density is None else self.density)
        aware = pool(q, site.block) @ pool(k, site.block).mT

        def choose(aware: Tensor) -> Tensor:
            received = memory["received"] if blocks.index is None else memory["received"][..., blocks.index]
            kept = pairs / blocks.tokens**2 * aware.shape[-1]  # blocks of a row
            number = int(self.agnostic * (kept - 1))
            if number > 0:
                first = select_top(received[:, :, None], min(number, aware.shape[-1]))
                aware = aware.masked_fill(first, torch.finfo(aware.dtype).max)
            return blocks.keep_at(aware, pairs)

        return Plan.from_mask(blocks.choose(aware, choose), site.grid.tokens, site.block)
