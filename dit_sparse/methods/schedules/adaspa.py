"""AdaSpa: block selection by exact attention mass, searched at a few steps with a cached log-sum-exp.

Source: Y. Xia et al., "Training-free and Adaptive Sparse Attention for Efficient Long Video Generation",
arXiv:2502.21079, sec. 4. With the log-sum-exp L of every query known, the mass of a block takes one exponential per
pair:

    W_ij = sum over r in block i, c in block j of exp(q_r . k_c / sqrt(D) - L_r)

The first search computes L; later ones reuse it, because it hardly changes over the steps. Every row keeps the same
number of blocks, those with the most mass. The density is adapted to heads in three levels with an unchanged mean: with
sparsity s, the n heads whose kept blocks hold the most mass get sparsity (1 + s)/2, the n that hold the least get (3s -
1)/2, where n is the number of heads whose kept blocks hold over 0.8, at most half of the heads.

The plan is reused between searches. The authors search at steps 10 and 30 of 50, with sparsity .8 and blocks of 64.

Planning: N^2 D / 4 multiply-adds (every 4th query), at each search.

Differs from the authors:
- Their pseudo-code prints log for exp.
- The recall of a head is relative to the mass of its own rows, because rows of a map made with an older L need not sum
  to one.
- s is the sparsity of the pairs without text. If the third level would exceed density 1, or the first one would be
  below the density of the diagonal, all heads get the same density.
- A search uses every fourth query (``queries_per_block``). Theirs uses all, because a dense step gives L at no extra
  cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...density import video_blocks
from ...grid import Site
from ...kernels.planning.block_mass import block_mass, block_mass_and_lse
from ...method import Method
from ...notation.settings import POWER_OF_TWO, within
from ...plan import Plan
from ...scoring import check_queries_per_block


@dataclass(frozen=True, kw_only=True)
class AdaSpa(Method):
    """Exact block mass.

    Attributes:
        density: the authors use 0.2.
        head_adaptive: whether heads get different densities.
        search_interval: steps between two searches: a count (int) or a fraction of all steps (float).
        queries_per_block: queries of each block that a search uses: a power of two that divides the block. None, or
            more than the block holds: all.
    """

    manages_own_plans: ClassVar[bool] = True

    head_adaptive: bool = True
    search_interval: int | float = within("[1, 10000]", 0.4, float="(0, 1]")
    queries_per_block: int | None = within(POWER_OF_TWO, 16)

    def begin_generation(self, q: Tensor, site: Site, reserved_bytes: int = 0) -> int:
        check_queries_per_block(self.queries_per_block, site.block)
        return 0

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Plan:
        interval = self.search_interval
        interval = max(1, int(interval * (site.steps or 50) if isinstance(interval, float) else interval))
        if "plan" not in memory or site.step - memory["step"] >= interval:
            memory.update(plan=self._search(q, k, site, memory), step=site.step)
        return memory["plan"]

    def _search(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Plan:
        rows = min(self.queries_per_block or site.block, site.block)
        if "lse" in memory:
            mass = block_mass(q, k, memory["lse"], site.block, rows=rows)
        else:
            mass, memory["lse"] = block_mass_and_lse(q, k, site.block, rows=rows)
        blocks = video_blocks(site.grid, site.block, q.device)
        pairs = blocks.pairs(0.2 if self.density is None else self.density)
        choose = lambda pairs: blocks.choose(mass, lambda mass: blocks.keep_at(mass, pairs))
        keep = choose(pairs)
        if self.head_adaptive and 2 * blocks.own_pairs <= pairs <= 2 / 3 * blocks.tokens**2:
            recall = (mass * keep).sum((-2, -1)) / mass.sum((-2, -1))
            keep = choose(pairs * _share_by_head(recall))
        return Plan.from_mask(keep, site.grid.tokens, site.block)


def _share_by_head(recall: Tensor) -> Tensor:
    """Return the pairs of every head in multiples of the mean, from its recall: ``[B, H]`` both, with the mean 1."""
    heads = recall.shape[1]
    rank = recall.argsort(dim=-1, descending=True, stable=True).argsort(-1)  # 0: the highest recall
    n = (recall > 0.8).sum(-1, keepdim=True).clamp(max=heads // 2)
    return torch.where(rank < n, 0.5, torch.where(rank >= heads - n, 1.5, 1.0))
