"""Sparse-vDiT: every head of every layer has one of a few shapes, found once.

Source: P. Chen et al., "Sparse-vDiT: Unleashing the Power of Sparse Attention to Accelerate Video Diffusion
Transformers", arXiv:2506.03065, sec. 3. The modes of a head:

    diagonal        a band while tokens stand frame by frame (`svg.spatial`)
    multi-diagonal  a band while they stand place by place (`svg.temporal`): diagonals one frame apart
    vertical        a fixed set of keys for all queries
    skip            no output at all
    full            dense

They choose offline, a few prompts, the mode with the least error + lambda (1 - work saved). That search is `dit-sparse
profile` with the candidates `vdit`, under a density or an error to keep instead of the two constants; its result is a
profile. The method of this file needs none: at the first sparse step each head takes the band or the columns that keep
most of the attention of ``samples`` of its queries, and stays with it, because the shapes hardly depend on the prompt.

Differs from the authors: online choice by kept attention, without `skip` and `full`, at one density for all heads; the
columns are the blocks that receive most (they do not say which).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..grid import Site
from ..method import AttentionOutput, Method, Scorer
from ..plan import Plan
from ..scoring import sampled_attention
from .svg import Band, Temporal


@dataclass(frozen=True, kw_only=True)
class Vertical(Scorer):
    """The blocks of keys that receive most attention, the same for all queries.

    Attributes:
        samples: queries that are asked.
        seed: of the sample.
    """

    samples: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise ValueError(f"samples is how many queries are asked, at least 1, not {self.samples}")

    def score(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Tensor:
        _, weights = sampled_attention(q, k, site.grid, self.samples, self.seed)
        received = torch.nn.functional.pad(weights.sum(2), (0, -weights.shape[-1] % site.block))
        columns = received.unflatten(-1, (-1, site.block)).sum(-1).log()
        return columns[:, :, None].expand(-1, -1, columns.shape[-1], -1)


@dataclass(frozen=True, kw_only=True)
class Skip(Method):
    """A head that is left out: its output is zero. What is computed for it is its own blocks, and the text."""

    def plan(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Plan:
        return Band(width=1e-6).plan(q, k, site, memory)

    def correct(self, done: AttentionOutput, site: Site, memory: dict) -> tuple[Tensor, Tensor | None]:
        return torch.zeros_like(done.out), done.lse


@dataclass(frozen=True, kw_only=True)
class VDiT(Method):
    """Diagonal, multi-diagonal or vertical, a head at a time.

    Attributes:
        density: of each of the three; .25 where none is given.
        samples: queries that choose.
        seed: of the sample.
    """

    manages_own_plans: ClassVar[bool] = True

    samples: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        Vertical(samples=self.samples)

    def plan(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Plan:
        if "plan" not in memory:
            density = 0.25 if self.density is None else self.density
            vertical = Vertical(density=density, samples=self.samples, seed=self.seed)
            modes = (Band(density=density), Temporal(density=density), vertical)
            plans = [mode.plan(q, k, site, memory) for mode in modes]
            rows, weights = sampled_attention(q, k, site.grid, self.samples, self.seed)
            kept = torch.stack([(weights * plan.token_mask(rows)).sum((-2, -1)) for plan in plans])
            memory["plan"] = Plan.by_head(plans, kept.argmax(0))
        return memory["plan"]
