"""AdaSpa: block selection by exact attention mass, searched at a few steps with a cached log-sum-exp.

Source: Y. Xia et al., "Training-free and Adaptive Sparse Attention for Efficient Long Video Generation",
arXiv:2502.21079, sec. 4. With the log-sum-exp L of every query known, the mass of a block takes one exponential per
pair:

    W_ij = sum over r in block i, c in block j of exp(q_r . k_c / sqrt(D) - L_r)

The first search computes L; later ones reuse it, because it hardly changes over the steps. Every row keeps the same
number of heaviest blocks. The density is adapted to heads in three levels with an unchanged mean: with sparsity s, the
n heads whose kept blocks hold the most mass get sparsity (1 + s)/2, the n that hold the least get (3s - 1)/2, where n
is the number of heads that hold over .8, at most half of them.

Between searches the plan stays. The authors search at steps 10 and 30 of 50, with sparsity .8 and blocks of 64.

Differs from the authors:
- Their pseudo-code prints log for exp.
- The recall of a head is relative to the mass of its own rows, because rows of a map made with an older L need not sum
  to one.
- Below s = 1/3, where the third level would be denser than dense, all heads get the same density.
- A search looks at every fourth query (``queries_per_block``). Theirs looks at all, because it gets L for free from a
  dense step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import Top
from ..grid import Blocks, Site
from ..kernels.planning.block_mass import block_mass, block_mass_and_lse
from ..kernels.planning.selection import select_top
from ..method import Method, required_blocks
from ..plan import Plan


@dataclass(frozen=True, kw_only=True)
class AdaSpa(Method):
    """Exact block mass.

    Attributes:
        density: the authors use 0.2.
        head_adaptive: whether heads get different densities.
        search_interval: steps between two searches: a count (int) or a fraction of all steps (float).
        queries_per_block: queries of each block that a search looks at, a divisor of the block. None, or more than the
            block holds: all.
    """

    manages_own_plans: ClassVar[bool] = True

    head_adaptive: bool = True
    search_interval: int | float = 0.4
    queries_per_block: int | None = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.search_interval <= 0:
            raise ValueError(f"search_interval must be greater than 0, got {self.search_interval}")
        if self.queries_per_block is not None and self.queries_per_block < 1:
            raise ValueError(f"queries_per_block must be at least 1, got {self.queries_per_block}")

    def begin_generation(self, q: Tensor, site: Site, reserved_bytes: int = 0) -> int:
        if site.block % min(self.queries_per_block or 1, site.block):
            raise ValueError(f"queries_per_block must divide the block of {site.block}, got {self.queries_per_block}")
        return 0

    def plan(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Plan:
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
        required = required_blocks(Blocks.from_grid(site.grid, site.block)).to(q.device)
        scores, density = mass.masked_fill(required, torch.inf), 0.2 if self.density is None else self.density
        keep = Top(density).keep(scores)
        if self.head_adaptive and density <= 2 / 3:
            recall = (mass * keep).sum((-2, -1)) / mass.sum((-2, -1))
            blocks = (_density_by_head(recall, density) * mass.shape[-1]).round()
            keep = select_top(scores, blocks[..., None, None])
        return Plan.from_mask(keep, site.grid.tokens, site.block)


def _density_by_head(recall: Tensor, density: float) -> Tensor:
    """Return the density of every head from its recall, ``[B, H]`` both, with the mean ``density``."""
    heads, sparsity = recall.shape[1], 1 - density
    rank = recall.argsort(dim=-1, descending=True, stable=True).argsort(-1)  # 0: the highest recall
    n = (recall > 0.8).sum(-1, keepdim=True).clamp(max=heads // 2)
    by_head = torch.full_like(recall, density)
    by_head[rank < n], by_head[rank >= heads - n] = (1 - (1 + sparsity) / 2), 1 - (3 * sparsity - 1) / 2
    return by_head
