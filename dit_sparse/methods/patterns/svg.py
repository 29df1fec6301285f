"""Sparse VideoGen (SVG): each head attends to nearby frames or to the same place in all frames, chosen online.

Source: H. Xi, S. Yang et al., "Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal
Sparsity", arXiv:2502.01776, sec. 3-4. A spatial head attends within its frame and adjacent frames: a band around the
diagonal in frame-by-frame order. A temporal head attends to its own place in all frames: a band around the diagonal in
place-by-place order. So both patterns are one band in two token orders. Online, each head takes the order in which the
band keeps more attention of ``samples`` random queries.

Planning: 64 N D multiply-adds (64 sampled queries).

Differs from the authors:
- The better pattern is the one that keeps more attention mass, not the one with the smaller output error, because plans
  are made from queries and keys alone.
- Queries are sampled from the whole sequence; their code samples the first 10,000 tokens.
- Patterns are compared at the width that is then computed; their code compares at a fixed width.
- The density is met to half a pair of blocks, including text.
- No sink: the first frame that their code keeps for Wan is the first frame only in the spatial order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from ... import order
from ...grid import Grid, Site
from ...method import Method
from ...notation.settings import within
from ...pattern import Pattern
from ...plan import Plan, num_blocks
from ...scoring import sampled_attention


@dataclass(frozen=True, kw_only=True)
class Band(Pattern):
    """Band around the diagonal in frame-by-frame order: the spatial heads.

    Attributes:
        width: half-width of the band as a fraction of the sequence.
    """

    depends_on_shape: ClassVar[bool] = False
    knob: ClassVar[str] = "width"
    knob_range: ClassVar[tuple[float, float]] = (1e-4, 1.0)

    width: float = within("(0, 1]", 0.25)

    def keep(self, grid: Grid, block: int) -> Tensor:
        position = torch.arange(num_blocks(grid.tokens, block))
        return (position[:, None] - position).abs() * block <= self.width * grid.tokens


@dataclass(frozen=True, kw_only=True)
class Temporal(Band):
    """Band around the diagonal in place-by-place order: the temporal heads."""

    needs_raster: ClassVar[bool] = True
    depends_on_shape: ClassVar[bool] = True

    def order(self, grid: Grid, block: int) -> Tensor:
        return order.frame_last(grid)


@dataclass(frozen=True, kw_only=True)
class SVG(Method):
    """Spatial and temporal heads.

    Attributes:
        density: the authors use 0.25 for HunyuanVideo, 0.3 for Wan.
        samples: number of random queries that compare the two patterns.
        seed: of the sample.
    """

    needs_raster: ClassVar[bool] = True

    samples: int = within("[1, 10000]", 64)
    seed: int = within("[0, 4294967296)", 0)

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Plan:
        grid, block = site.grid, site.block
        plan = _band_plan(0.25 if self.density is None else self.density, grid, block).to(q.device)
        orders = torch.stack([order.row_major(grid), order.frame_last(grid)]).to(q.device)
        rows, weights = sampled_attention(q, k, grid, self.samples, self.seed)
        mask, blocks = plan.block_mask()[0, 0], orders.argsort(-1) // block
        spatial, temporal = ((weights * mask[at[rows]][:, at]).sum((-2, -1)) for at in blocks)  # [B, H]
        return replace(plan, order=orders[(temporal > spatial).long()])


@cache
def _band_plan(density: float, grid: Grid, block: int) -> Plan:
    """Plan of the band, which all heads and steps share up to the order."""
    return Plan.from_mask(Band(density=density).block_mask(grid, block)[None, None], grid.tokens, block)
