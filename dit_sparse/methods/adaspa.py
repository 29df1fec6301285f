"""AdaSpa: the exact attention map of every head, searched for at a few steps, with a log-sum-exp that is kept.

Source: Y. Xia et al., "Training-free and Adaptive Sparse Attention for Efficient Long Video Generation",
arXiv:2502.21079, sec. 4. With the log-sum-exp L of every query known, the mass of a block is one exponential per pair,

    W_ij = sum over r in block i, c in block j of exp(q_r . k_c / sqrt(D) - L_r)

The first search computes L; later ones keep it, for it hardly changes over the steps. Every row keeps the same number
of blocks, the heaviest. Heads differ in three levels at an unchanged mean: with sparsity s, the n heads whose kept
blocks hold the most mass get (1 + s)/2, the n that hold the least (3s - 1)/2, n being the heads that hold over .8, at
most half.

Between searches the plan stays. The authors search at steps 10 and 30 of 50, with sparsity .8 and blocks of 64.

Differs from the authors: their pseudo-code prints log for exp. Rows of a map made with an old L need not sum to one, so
recalls are relative to the row's own sum. Below s = 1/3, where the third level would be denser than dense, all heads
get the same. A search looks at every fourth query (``rows``): theirs gets L for nothing from a dense step, and looks at
all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import Top
from ..grid import Blocks, Site
from ..kernels.planning.block_mass import block_mass, first_block_mass
from ..kernels.planning.selection import select_best
from ..method import Method, required_blocks
from ..plan import Plan


@dataclass(frozen=True, kw_only=True)
class AdaSpa(Method):
    """Exact block mass.

    Attributes:
        density: the authors use .2.
        levels: whether heads get different shares.
        every: steps from one search to the next: a count, or a fraction of all steps.
        rows: queries of each block that a search looks at, a divisor of the block; None, or more than it has: all.
    """

    manages_own_plans: ClassVar[bool] = True

    levels: bool = True
    every: int | float = 0.4
    rows: int | None = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every <= 0 or (self.rows is not None and self.rows < 1):
            raise ValueError(f"every is positive and rows at least 1, not {self.every} and {self.rows}")

    def begin_generation(self, q: Tensor, site: Site, reserved_bytes: int = 0) -> int:
        if site.block % min(self.rows or 1, site.block):
            raise ValueError(f"rows must divide the block of {site.block} tokens, not {self.rows}")
        return 0

    def plan(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Plan:
        every = self.every * (site.steps or 50) if isinstance(self.every, float) else self.every
        if "plan" not in memory or site.step - memory["step"] >= max(1, int(every)):
            memory.update(plan=self._search(q, k, site, memory), step=site.step)
        return memory["plan"]

    def _search(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Plan:
        rows = min(self.rows or site.block, site.block)
        if "lse" in memory:
            mass = block_mass(q, k, memory["lse"], site.block, rows=rows)
        else:
            mass, memory["lse"] = first_block_mass(q, k, site.block, rows=rows)
        always = required_blocks(Blocks.from_grid(site.grid, site.block)).to(q.device)
        scores, density = mass.masked_fill(always, torch.inf), 0.2 if self.density is None else self.density
        keep = Top(density).keep(scores)
        if self.levels and density <= 2 / 3:
            recall = (mass * keep).sum((-2, -1)) / mass.sum((-2, -1))
            wanted = (_by_level(recall, density) * mass.shape[-1]).round()
            keep = select_best(scores, wanted[..., None, None])
        return Plan.from_mask(keep, site.grid.tokens, site.block)


def _by_level(recall: Tensor, density: float) -> Tensor:
    """The density of every head by the mass that it keeps, ``[B, H]`` both, at the mean asked for."""
    heads, sparsity = recall.shape[1], 1 - density
    place = recall.argsort(dim=-1, descending=True, stable=True).argsort(-1)  # 0: the head that holds the most
    n = (recall > 0.8).sum(-1, keepdim=True).clamp(max=heads // 2)
    level = torch.full_like(recall, density)
    level[place < n], level[place >= heads - n] = (1 - (1 + sparsity) / 2), 1 - (3 * sparsity - 1) / 2
    return level
