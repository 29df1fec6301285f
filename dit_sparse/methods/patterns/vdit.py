"""Sparse-vDiT: a diagonal, multi-diagonal or vertical mask for each head, chosen once.

Source: P. Chen et al., "Sparse-vDiT: Unleashing the Power of Sparse Attention to Accelerate Video Diffusion
Transformers", arXiv:2506.03065, sec. 3. Each head has one of these modes:

    diagonal        a band around the diagonal in frame-by-frame order (`svg.spatial`)
    multi-diagonal  a band in place-by-place order (`svg.temporal`): diagonals one frame apart
    vertical        the same keys for all queries
    skip            output zero
    full            dense

The authors search offline, on a few prompts, for the mode with the least error + lambda (1 - work saved). Here that
search is `dit-sparse profile` with the candidates `vdit`, which meets a target density or error instead of using the
two constants, and writes a profile. The method in this file needs no search: at the first sparse step each head takes
the band or the columns that keep most of the attention of ``samples`` random queries, and keeps this choice, because
shapes hardly depend on the prompt.

Planning: 128 N D multiply-adds (64 sampled queries, twice), once per generation.

Differs from the authors: the choice is made online, by attention mass, without `skip` and `full`, and all heads have
the same density. The columns are the blocks that receive most attention; the paper does not specify the authors'
choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...grid import Site
from ...method import AttentionOutput, Method, Scorer
from ...notation.settings import within
from ...plan import Plan
from ...scoring import attention_received, sampled_attention
from .svg import Band, Temporal


@dataclass(frozen=True, kw_only=True)
class Vertical(Scorer):
    """The key blocks that receive most attention, the same for all queries.

    Attributes:
        samples: number of random queries that measure the attention.
        seed: of the sample.
    """

    samples: int = within("[1, 10000]", 64)
    seed: int = within("[0, 4294967296)", 0)

    def score(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Tensor:
        columns = attention_received(q, k, site, self.samples, self.seed).log()
        return columns[:, :, None].expand(-1, -1, columns.shape[-1], -1)


@dataclass(frozen=True, kw_only=True)
class Skip(Method):
    """Sets the output of a head to zero. The plan holds only text and the diagonal."""

    density_exception: ClassVar[str] = "skipped heads compute only text and the diagonal"

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Plan:
        return Band(width=1e-6).plan(q, k, v, site, memory)

    def correct(self, result: AttentionOutput, site: Site, memory: dict) -> tuple[Tensor, Tensor | None]:
        return torch.zeros_like(result.out), result.lse


@dataclass(frozen=True, kw_only=True)
class VDiT(Method):
    """Diagonal, multi-diagonal or vertical, for each head.

    Attributes:
        density: of each of the three modes; 0.25 if None.
        samples: number of random queries that compare the modes.
        seed: of the sample.
    """

    needs_raster: ClassVar[bool] = True
    manages_own_plans: ClassVar[bool] = True

    samples: int = within("[1, 10000]", 64)
    seed: int = within("[0, 4294967296)", 0)

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Plan:
        if "plan" not in memory:
            density = 0.25 if self.density is None else self.density
            vertical = Vertical(density=density, samples=self.samples, seed=self.seed)
            modes = (Band(density=density), Temporal(density=density), vertical)
            plans = [mode.plan(q, k, v, site, memory) for mode in modes]
            rows, weights = sampled_attention(q, k, site.grid, self.samples, self.seed)
            mass = torch.stack([(weights * plan.token_mask(rows)).sum((-2, -1)) for plan in plans])
            memory["plan"] = Plan.by_head(plans, mass.argmax(0))
        return memory["plan"]
