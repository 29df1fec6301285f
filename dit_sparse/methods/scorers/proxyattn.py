"""ProxyAttn: block scores of representative heads, and a budget for each head from a few probe queries.

Source: Y. Wang et al., "ProxyAttn: Guided Sparse Attention via Representative Heads", arXiv:2509.24745. Heads are
divided into groups. The mean queries and keys of a group, of the first token in each stride of s tokens, give the score
of a block:

    A_ij = max over tokens r of block i and c of block j of  softmax_c(q_r . k_c / sqrt(D))

All heads of the group rank the blocks by it, but each has a budget of its own: with the attention of probe queries,
summed over blocks, the smallest fraction of the blocks that holds the part ``mass`` of it.

Planning: N^2 D / 32 + 64 N D multiply-adds (every 4th query and key, one of two heads; 64 probes).

Differs from the authors:
- Heads with similar attention form a group, found from the probe queries: the most different heads are seeds, and every
  other head joins the most similar seed. Theirs are neighbours, but heads of video models differ more than those of
  language models, and the mean of different heads ranks blocks poorly.
- Probe queries are spread over the video, and the budget of a head is the mean over them. Theirs are the last block,
  and are averaged first, which would make local heads look dense here.
- With a density, the budgets are scaled, within the diagonal and all blocks, so that their mean over heads meets it.
- The own block is kept and counts in the budget. The default values of the settings are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...density import VideoBlocks, share_pairs, video_blocks
from ...grid import BaseGrid, Site
from ...kernels.planning.selection import select_top
from ...method import Method
from ...notation.settings import POWER_OF_TWO, within
from ...plan import Plan, num_blocks
from ...scoring import score_in_chunks


@dataclass(frozen=True, kw_only=True)
class ProxyAttn(Method):
    """Shared block ranking and budgets of heads.

    Attributes:
        group_size: mean number of heads in a group.
        stride: s, tokens for each one that is scored: a power of two that divides the block.
        probes: number of probe queries.
        mass: part of the attention of probe queries that the budget of a head holds.
    """

    group_size: int = within("[1, 1000]", 2)
    stride: int = within(POWER_OF_TWO, 8)
    probes: int = within("[1, 10000]", 64)
    mass: float = within("(0, 1]", 0.9)

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Plan:
        if site.block % self.stride:
            raise ValueError(f"stride must divide the block of {site.block}, got {self.stride}")
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        probes = self._probe(q, k, site.grid, site.block)
        group = group_heads(probes.flatten(2), -(-q.shape[1] // self.group_size))
        scores = self._score(q, k, group, site.block)
        scores = scores.gather(1, group.argmax(-1)[..., None, None].expand(-1, -1, *scores.shape[2:]))
        blocks = video_blocks(site.grid, site.block, q.device)
        keep = blocks.choose(scores, lambda scores: self._choose(scores, probes, blocks))
        return Plan.from_mask(keep, site.grid.tokens, site.block)

    def _probe(self, q: Tensor, k: Tensor, grid: BaseGrid, block: int) -> Tensor:
        """Return the attention of evenly spaced video queries to every block, ``[B, H, probes, Qb]``."""
        count = min(self.probes, grid.video)
        rows = torch.arange(count, device=q.device) * grid.video // count + grid.before
        weights = (q[:, :, rows].float() @ k.float().mT * q.shape[-1] ** -0.5).softmax(-1)
        return F.pad(weights, (0, -grid.tokens % block)).unflatten(-1, (-1, block)).sum(-1)

    def _score(self, q: Tensor, k: Tensor, group: Tensor, block: int) -> Tensor:
        """Return the logarithms of the scores of every group, ``[B, G, Qb, Qb]``, from the groups of the heads, one-hot
        ``[B, H, G]``."""
        blocks, per_block, dim = num_blocks(q.shape[2], block), block // self.stride, q.shape[-1]
        share = (group / group.sum(1, keepdim=True).clamp(min=1)).mT
        queries, keys = (share @ x[:, :, :: self.stride].float().flatten(2) for x in (q, k))
        queries, keys = (x.unflatten(-1, (-1, dim)) for x in (queries, keys))
        queries, sampled = queries * dim**-0.5, keys.shape[2]
        keys = F.pad(keys, (0, 0, 0, blocks * per_block - sampled)).mT

        def score_rows(rows: slice) -> Tensor:
            logits = queries[:, :, rows.start * per_block : rows.stop * per_block] @ keys
            logits[..., sampled:] = -torch.inf
            best = logits.unflatten(-1, (blocks, per_block)).amax(-1)
            highest = best.amax(-1, keepdim=True)
            best = best - highest - logits.sub_(highest).exp_().sum(-1, keepdim=True).log()
            best = F.pad(best, (0, 0, 0, -best.shape[2] % per_block), value=-torch.inf)
            return best.unflatten(2, (-1, per_block)).amax(3)

        return score_in_chunks(score_rows, blocks, queries.shape[0] * queries.shape[1] * per_block**2 * blocks)

    def _choose(self, scores: Tensor, probes: Tensor, blocks: VideoBlocks) -> Tensor:
        """Return the mask of the blocks without text, ``[B, H, V, V]``, from their scores."""
        probes = probes if blocks.index is None else probes[..., blocks.index]
        mass = probes.sort(-1, descending=True).values
        counts = (mass.cumsum(-1) - mass < self.mass * mass.sum(-1, keepdim=True)).sum(-1).float()
        budget = counts.mean(-1).clamp(min=1)  # blocks of each head
        if self.density is None:
            scores = scores.masked_fill(blocks.own, torch.inf)
            return select_top(scores, budget.round()[..., None, None])
        return blocks.keep_at(
            scores, share_pairs(blocks.pairs(self.density), budget, blocks.own_pairs, blocks.tokens**2)
        )


def group_heads(features: Tensor, groups: int) -> Tensor:
    """Divide heads into groups of similar features.

    Args:
        features: ``[B, H, F]``.
        groups: G; some are empty if several heads have equal features.

    Returns:
        The group of every head, float32 one-hot ``[B, H, G]``.
    """
    features = F.normalize(features, dim=-1)
    similarity = features @ features.mT
    seeds = [similarity[:, 0]]
    for _ in range(groups - 1):
        farthest = torch.stack(seeds).amax(0).argmin(-1)
        seeds.append(similarity.gather(1, farthest[:, None, None].expand(-1, 1, similarity.shape[-1]))[:, 0])
    return F.one_hot(torch.stack(seeds, -1).argmax(-1), groups).float()
