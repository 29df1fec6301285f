"""SparseD: one exact block mask for each head, computed after the dense steps and reused to the end.

Source: Z. Wang et al., "SparseD: Sparse Attention for Diffusion Language Models", arXiv:2509.24014, sec. 4. Attention
differs between heads but hardly changes over the denoising steps. So one exact attention map, averaged over the queries
of each block and the keys of each block, decides for the whole generation. Selection is isolated: every group of
columns keeps the same fraction of its best blocks, so that no group is dropped entirely.

Differs from the authors:
- Their groups are prompt and answer. Here text is always kept, and the video is cut into ``groups`` runs of frames.
- The map is that of every fourth query (``queries_per_block``).
- Scores are divided by the square root of head_dim; their code divides by that of the number of heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..grid import Blocks, Site
from ..kernels.planning.block_mass import block_mass_and_lse
from ..kernels.planning.selection import select_top
from ..method import Method, required_blocks
from ..plan import Plan


@dataclass(frozen=True, kw_only=True)
class SparseD(Method):
    """One exact attention map, reused.

    Attributes:
        density: the authors use 0.3.
        groups: runs of frames that each keep the same fraction of their blocks.
        queries_per_block: queries of each block that the map looks at, a divisor of the block. None, or more than the
            block holds: all.
    """

    manages_own_plans: ClassVar[bool] = True

    groups: int = 3
    queries_per_block: int | None = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries_per_block is not None and self.queries_per_block < 1:
            raise ValueError(f"queries_per_block must be at least 1, got {self.queries_per_block}")
        if self.groups < 1:
            raise ValueError(f"groups, the number of runs of frames, must be at least 1, got {self.groups}")

    def begin_generation(self, q: Tensor, site: Site, reserved_bytes: int = 0) -> int:
        if site.block % min(self.queries_per_block or 1, site.block):
            raise ValueError(f"queries_per_block must divide the block of {site.block}, got {self.queries_per_block}")
        return 0

    def plan(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Plan:
        if "plan" not in memory:
            rows = min(self.queries_per_block or site.block, site.block)
            mass, _ = block_mass_and_lse(q, k, site.block, rows=rows)
            required = required_blocks(Blocks.from_grid(site.grid, site.block)).to(q.device)
            groups = mass.masked_fill(required, torch.inf).tensor_split(self.groups, -1)
            density = 0.3 if self.density is None else self.density
            keep = torch.cat([select_top(group, round(density * group.shape[-1])) for group in groups], -1)
            memory["plan"] = Plan.from_mask(keep, site.grid.tokens, site.block)
        return memory["plan"]
