"""Sparse VideoGen: every head is spatial or temporal, and a few sampled queries tell which.

Source: H. Xi, S. Yang et al., "Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal
Sparsity", arXiv:2502.01776, sec. 3-4. A spatial head attends within its frame and the frames beside it: a band around
the diagonal while tokens stand frame by frame. A temporal head attends to its own place in all frames: a band again,
once tokens stand place by place. So the two patterns are one band in two orders. Online, each head takes the pattern
that serves ``samples`` of its queries better.

Differs from the authors: a pattern serves a query by the attention it keeps, not by the error of its output, because
plans are made from queries and keys; the queries are sampled from the whole sequence (their code: its first 10,000
tokens); they are judged under the band that is then computed (their code: one of fixed width); the density is met to a
block pair, text and all. No sink: what their code keeps for Wan as the first frame is that only in the spatial order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from .. import order
from ..grid import Grid, Site
from ..method import Method, Pattern
from ..plan import Plan, num_blocks
from ..scoring import sampled_attention


@dataclass(frozen=True, kw_only=True)
class Band(Pattern):
    """Blocks at most ``width`` of the sequence away, in whatever order it stands."""

    knob: ClassVar[str] = "width"
    knob_range: ClassVar[tuple[float, float]] = (1e-4, 1.0)

    width: float = 0.25

    def keep(self, grid: Grid, block: int) -> Tensor:
        place = torch.arange(num_blocks(grid.tokens, block))
        return (place[:, None] - place).abs() * block <= self.width * grid.tokens


@dataclass(frozen=True, kw_only=True)
class Temporal(Band):
    """The band of the temporal heads."""

    def order(self, grid: Grid, block: int) -> Tensor:
        return order.frame_last(grid)


@dataclass(frozen=True, kw_only=True)
class SVG(Method):
    """Spatial and temporal heads.

    Attributes:
        density: the authors use .25 for HunyuanVideo, .3 for Wan.
        samples: queries that choose.
        seed: of the sample.
    """

    samples: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise ValueError(f"samples is how many queries choose a pattern, at least 1, not {self.samples}")

    def plan(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Plan:
        grid, block = site.grid, site.block
        plan = _band(0.25 if self.density is None else self.density, grid, block).to(q.device)
        orders = torch.stack([order.row_major(grid), order.frame_last(grid)]).to(q.device)
        spatial, temporal = self._kept_mass(q, k, plan.block_mask()[0, 0], orders, grid, block)
        choice = orders[(temporal > spatial).long()]  # [B, H, N]
        return replace(plan, order=choice)

    def _kept_mass(self, q: Tensor, k: Tensor, keep: Tensor, orders: Tensor, grid: Grid, block: int) -> list[Tensor]:
        """Attention that the sampled queries of each head keep in either order, ``[B, H]`` each."""
        rows, weights = sampled_attention(q, k, grid, self.samples, self.seed)
        blocks = [one.argsort() // block for one in orders]
        return [(weights * keep[at[rows]][:, at]).sum((-2, -1)) for at in blocks]


@cache
def _band(density: float, grid: Grid, block: int) -> Plan:
    """Made once: only the orders differ from head to head and step to step."""
    return Plan.from_mask(Band(density=density).block_map(grid, block)[None, None], grid.tokens, block)
