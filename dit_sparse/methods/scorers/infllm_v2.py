"""InfLLM-V2: block scores without parameters, from overlapping means of keys, max-pooled to blocks.

Source: W. Zhao et al., "InfLLM-V2: Dense-Sparse Switchable Attention for Seamless Short-to-Long Adaptation",
arXiv:2509.24663, sec. 3. Keys are pooled to the means c_j of 32 consecutive tokens, one for every 16. With a
log-sum-exp L_r that is approximated by still coarser means (of 128 tokens, one for every 64), the score of key block J
is

    s_J = max over the windows j that overlap block J of  sum over heads h of a group  exp(q_rh . c_j / sqrt(D) - L_rh)

so that it does not depend on where blocks begin. All heads of the group keep the same blocks: the first block, the
local window of 2048 tokens and the best others, 64 and 32 blocks of 64 tokens. Sequences below 8192 tokens stay dense.

Planning: N^2 D / 102 multiply-adds (every 8th query; means at every 16th and every 64th key).

Differs from the authors:
- Blocks of queries select, not single queries: probabilities are averaged over ``queries_per_block`` queries.
- Diffusion models have no groups of query heads, so by default every head selects for itself (``head_group``).
- The window extends to both sides.
- With a density, sequences of any length are sparse, and a third of the blocks of each row is its window, as in their
  96 blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ...budget import Budget, Top
from ...density import VideoBlocks
from ...grid import Site
from ...method import Scorer
from ...notation.settings import POWER_OF_TWO, within
from ...plan import Plan, num_blocks
from ...scoring import sample_queries, score_in_chunks, split_blocks


@dataclass(frozen=True, kw_only=True)
class InfLLMV2(Scorer):
    """Overlapping means of keys.

    Attributes:
        stride: tokens between two means of ``2 * stride`` tokens: a power of two that divides the block.
        selected: blocks that a row keeps without a density, besides the window.
        window: blocks of the local window without a density.
        min_tokens: shorter sequences stay dense without a density.
        queries_per_block: queries of each block that score.
        head_group: consecutive heads that keep the same blocks.
    """

    stride: int = within(POWER_OF_TWO, 16)
    selected: int = within("[1, 100000]", 64)
    window: int = within("[0, 100000]", 32)
    min_tokens: int = within("[0, 1000000000]", 8192)
    queries_per_block: int = within("[1, 256]", 8)
    head_group: int = within("[1, 1000]", 1)

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Plan | None:
        if site.block % self.stride:
            raise ValueError(f"stride must divide the block of {site.block}, got {self.stride}")
        has_paper_budget = self.density is None and self.budget is None
        return None if has_paper_budget and q.shape[2] < self.min_tokens else super().plan(q, k, v, site, memory)

    def paper_budget(self, blocks: VideoBlocks) -> Budget:
        return Top(min(1.0, self.selected / max(1, len(blocks.sizes))))

    def score(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Tensor:
        queries = sample_queries(q, site.block, self.queries_per_block) * q.shape[-1] ** -0.5
        fine, coarse = (mean_windows(k, factor * self.stride) for factor in (1, 4))
        blocks, samples, per_block = *queries.shape[2:4], site.block // self.stride
        ends = (1, blocks * per_block - fine.shape[2])  # the window before the first one of a block overlaps it

        def score_rows(rows: slice) -> Tensor:
            sampled = queries[:, :, rows].flatten(2, 3)
            logits = sampled @ fine.mT - (sampled @ coarse.mT).logsumexp(-1, keepdim=True)
            mean = self._sum_groups(logits.unflatten(2, (-1, samples)).logsumexp(3), site)
            return F.max_pool2d(F.pad(mean, ends, value=-torch.inf), (1, per_block + 1), (1, per_block))

        scores = score_in_chunks(score_rows, blocks, q.shape[0] * q.shape[1] * samples * fine.shape[2])
        return scores.masked_fill(self._forced(site, q.device), torch.inf)

    def _sum_groups(self, logits: Tensor, site: Site) -> Tensor:
        """Return the log of the sum of exponentials over the heads of each group, ``[B, H, Q, J]``."""
        if self.head_group == 1:
            return logits
        first, heads = (site.first_head or 0) % self.head_group, logits.shape[1]
        edges = [0, *range(self.head_group - first, heads, self.head_group), heads]
        sums = (
            logits[:, low:high].logsumexp(1, keepdim=True).expand(-1, high - low, -1, -1)
            for low, high in pairwise(edges)
        )
        return torch.cat(list(sums), 1)

    def _forced(self, site: Site, device: torch.device) -> Tensor:
        """Return the first block of the video and the local window of each row, bool ``[Qb, Qb]``."""
        radius, position = self.window // 2, torch.arange(num_blocks(site.grid.tokens, site.block), device=device)
        first = position == -(-site.grid.before // site.block)
        if self.density is not None:
            blocks = self.blocks(site, device)
            kept = int(blocks.pairs(self.density) / max(1, blocks.tokens) / site.block)  # blocks of a row
            radius, first = max(0, kept // 6), first & (kept > 2)
        return ((position[:, None] - position).abs() <= radius) | first


def mean_windows(x: Tensor, stride: int) -> Tensor:
    """Return the mean of ``2 * stride`` tokens, or of those before the end, from every ``stride``-th token on, float32
    ``[B, H, ceil(N / stride), D]``."""
    halves = split_blocks(x, stride).sum(3)
    sizes = (x.shape[2] - torch.arange(halves.shape[2], device=x.device) * stride).clamp(max=2 * stride)
    return (halves + F.pad(halves[:, :, 1:], (0, 0, 0, 1))) / sizes[:, None]
