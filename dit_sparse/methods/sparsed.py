"""SparseD: the mask of every head is found once, after the dense steps, and kept to the end.

Source: Z. Wang et al., "SparseD: Sparse Attention for Diffusion Language Models", arXiv:2509.24014, sec. 4. Heads
differ, but over the denoising steps a head hardly changes. So one exact attention map, averaged over the queries of
each block and the keys of each block, decides for the whole generation. Selection is isolated: every group of columns
keeps the same fraction of its best blocks, so that none starves.

Differs from the authors: their groups are prompt and answer; here text is always kept, and the video is cut into
``groups`` runs of frames. The map is that of every fourth query (``rows``). Scores are divided by the square root of
head_dim (their code: of the number of heads).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..grid import Blocks, Site
from ..kernels.planning.block_mass import first_block_mass
from ..kernels.planning.selection import select_best
from ..method import Method, required_blocks
from ..plan import Plan


@dataclass(frozen=True, kw_only=True)
class SparseD(Method):
    """One exact map, kept.

    Attributes:
        density: the authors use .3.
        groups: runs of frames that are chosen from apart.
        rows: queries of each block that are looked at, a divisor of the block; None, or more than it has: all.
    """

    manages_own_plans: ClassVar[bool] = True

    groups: int = 3
    rows: int | None = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows is at least 1, not {self.rows}")
        if self.groups < 1:
            raise ValueError(f"groups is how many runs of frames are chosen from apart, at least 1, not {self.groups}")

    def begin_generation(self, q: Tensor, site: Site, reserved_bytes: int = 0) -> int:
        if site.block % min(self.rows or 1, site.block):
            raise ValueError(f"rows must divide the block of {site.block} tokens, not {self.rows}")
        return 0

    def plan(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Plan:
        if "plan" not in memory:
            rows = min(self.rows or site.block, site.block)
            mass, _ = first_block_mass(q, k, site.block, rows=rows)
            always = required_blocks(Blocks.from_grid(site.grid, site.block)).to(q.device)
            parts = mass.masked_fill(always, torch.inf).tensor_split(self.groups, -1)
            density = 0.3 if self.density is None else self.density
            keep = torch.cat([select_best(part, round(density * part.shape[-1])) for part in parts], -1)
            memory["plan"] = Plan.from_mask(keep, site.grid.tokens, site.block)
        return memory["plan"]
