"""SparseD: one exact block mask for each head, computed after the dense steps and reused to the end.

Source: Z. Wang et al., "SparseD: Sparse Attention for Diffusion Language Models", arXiv:2509.24014, sec. 4. Attention
differs between heads but hardly changes over the denoising steps. So one exact attention map, averaged over the queries
of each block and the keys of each block, determines the mask of the whole generation. Every row keeps the same fraction
of its best blocks. Selection is isolated: prompt and answer keep this fraction each, so that neither is dropped
entirely.

Planning: N^2 D / 4 multiply-adds (every 4th query), once per generation.

Differs from the authors:
- Text, the prompt here, is always kept, and so is the own block of every row.
- With ``groups`` the video is cut into runs of frames that are isolated, too, which costs accuracy.
- The map is that of every fourth query (``queries_per_block``).
- Scores are divided by the square root of head_dim; their code divides by that of the number of heads.
- Their rows keep one block more than the fraction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...density import VideoBlocks, keep_pairs, video_blocks
from ...grid import Site
from ...kernels.planning.block_mass import block_mass_and_lse
from ...method import Method
from ...notation.settings import POWER_OF_TWO, within
from ...plan import Plan
from ...scoring import check_queries_per_block


@dataclass(frozen=True, kw_only=True)
class SparseD(Method):
    """One exact attention map, reused.

    Attributes:
        density: the authors use 0.3.
        groups: runs of frames that each keep the same fraction of their pairs; 1, as the authors: none.
        queries_per_block: queries of each block that the map uses: a power of two that divides the block. None, or more
            than the block holds: all.
    """

    manages_own_plans: ClassVar[bool] = True

    groups: int = within("[1, 1000]", 1)
    queries_per_block: int | None = within(POWER_OF_TWO, 16)

    def begin_generation(self, q: Tensor, site: Site, reserved_bytes: int = 0) -> int:
        check_queries_per_block(self.queries_per_block, site.block)
        return 0

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Plan:
        if "plan" not in memory:
            rows = min(self.queries_per_block or site.block, site.block)
            mass, _ = block_mass_and_lse(q, k, site.block, rows=rows)
            blocks = video_blocks(site.grid, site.block, q.device)
            keep = blocks.choose(mass, lambda mass: self._choose(mass, blocks))
            memory["plan"] = Plan.from_mask(keep, site.grid.tokens, site.block)
        return memory["plan"]

    def _choose(self, mass: Tensor, blocks: VideoBlocks) -> Tensor:
        """Return the mask of the blocks to keep in every group of columns, from the mass ``[B, H, V, V]``."""
        pairs, columns = blocks.pairs(0.3 if self.density is None else self.density), mass.shape[-1]
        if self.groups == 1:
            return blocks.keep_at(mass, pairs)
        parts = (x.tensor_split(min(self.groups, columns), -1) for x in (mass, blocks.sizes, blocks.own))
        keep = (
            keep_pairs(scores, pairs * sizes.sum() / blocks.tokens, blocks.sizes, sizes, own, equal=True)
            for scores, sizes, own in zip(*parts, strict=True)
        )
        return torch.cat(list(keep), -1)
