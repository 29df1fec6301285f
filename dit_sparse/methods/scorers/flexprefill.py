"""FlexPrefill: each head ranks all its block pairs by block means, or keeps vertical and slash lines where means fail.

Source: X. Lai et al., "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference",
arXiv:2502.20766, sec. 3. For probe queries the true attention of blocks, t, and the attention e that block means
predict are compared by the Jensen-Shannon distance

    sqrt(KL(t || m) / 2 + KL(e || m) / 2),    m = (t + e) / 2

Heads with a distance below tau are query-aware: the softmax of mean(Q_i) . mean(K_j) / sqrt(D) over the row is computed
for all pairs (i, j), and the fewest best pairs of the whole head are kept whose sum reaches gamma times the number of
rows, so that rows have different budgets. In the other heads the attention of the probe queries is averaged over each
column and each diagonal; the fewest columns that reach gamma and the fewest diagonals that reach gamma are kept.

Planning: 128 N D + N^2 D / 4096 multiply-adds (128 probe queries; means of 64 tokens).

Differs from the authors:
- There is no last block of a prompt to probe. ``queries_per_block`` queries of each of ``probe_blocks`` blocks, evenly
  spaced over the video, take its place; the distance is the mean over these blocks. Diagonals have offsets of both
  signs, and each is averaged over the probe blocks that see it.
- Columns and diagonals are lines of blocks, which is what a plan computes, not of tokens. The attention of a probe
  block to itself belongs to its diagonal only.
- With a density, every head gets the same number of pairs. Query-aware heads keep their best pairs, the other heads the
  lines of both kinds with the most attention, because a common gamma keeps too many columns where attention is
  diagonal: on `shapes-wan` at density 0.25 the error of the output is 0.22 instead of 0.15.
- The own block of every row is kept in place of their minimum of 1024 tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...density import VideoBlocks, video_blocks
from ...grid import Site
from ...kernels.planning.selection import select_top
from ...method import Method
from ...notation.settings import within
from ...plan import Plan
from ...scoring import pool, sample_positions, score_in_chunks


@dataclass(frozen=True, kw_only=True)
class FlexPrefill(Method):
    """Query-aware or vertical-slash selection by head.

    Attributes:
        gamma: attention to keep without a density; the authors use 0.9 and 0.95.
        tau: Jensen-Shannon distance below which a head is query-aware.
        probe_blocks: blocks whose queries are probes.
        queries_per_block: probe queries of each of them.
    """

    gamma: float = within("(0, 1]", 0.9)
    tau: float = within("[0, 1]", 0.1)
    probe_blocks: int = within("[2, 256]", 8)
    queries_per_block: int = within("[1, 256]", 16)

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Plan:
        block, scale = site.block, q.shape[-1] ** -0.5
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        blocks = video_blocks(site.grid, block, q.device)
        logits = pool(q, block) @ pool(k, block).mT * scale

        def choose(logits: Tensor) -> Tensor:
            count = min(self.probe_blocks, logits.shape[-1])
            probes = torch.linspace(0, logits.shape[-1] - 1, count).round().long()
            logits = (logits + blocks.sizes.log()).log_softmax(-1)
            true = probe_attention(q, k, blocks, probes, self.queries_per_block)
            estimate = logits[:, :, probes.to(q.device)].exp()
            return self._choose(logits, true, jensen_shannon(true, estimate).mean(-1) < self.tau, probes, blocks, site)

        return Plan.from_mask(blocks.choose(logits, choose), site.grid.tokens, block)

    def _choose(
        self, logits: Tensor, true: Tensor, query_aware: Tensor, probes: Tensor, blocks: VideoBlocks, site: Site
    ) -> Tensor:
        """Return the mask ``[B, H, V, V]``.

        Args:
            logits: log of the predicted attention, ``[B, H, V, V]``.
            true: attention of the probe blocks, ``[B, H, P, V]``.
            query_aware: which heads rank pairs, ``[B, H]``.
            probes: numbers of the probe blocks, ``[P]``.
        """
        lines, query_aware = line_attention(true, probes), query_aware[..., None, None]
        if self.density is not None:
            scores = torch.where(query_aware, logits, torch.maximum(*to_pairs(*lines)))
            return blocks.keep_by_head(scores, blocks.pairs(self.density))
        target = self.gamma * logits.shape[-1] if self.gamma < 1 else math.inf
        pairs = logits.masked_fill(blocks.own, torch.inf).flatten(2)[:, :, None]
        keep = select_top(pairs, target, logits.exp().flatten(2)[:, :, None]).view(logits.shape)
        before = torch.minimum(*to_pairs(*map(mass_before, lines)))
        return torch.where(query_aware, keep, (before < self.gamma) | (self.gamma == 1) | blocks.own)


def probe_attention(q: Tensor, k: Tensor, blocks: VideoBlocks, probes: Tensor, queries: int) -> Tensor:
    """Return the attention of ``queries`` queries of each probe block on each block without text, ``[B, H, P, V]``."""
    block, tokens = blocks.block, q.shape[2]
    number = probes.to(q.device) if blocks.index is None else blocks.index[probes.to(q.device)]
    rows = sample_positions(tokens, block, queries).to(q.device)[number]
    keys = k.float().mT

    def attend(part: slice) -> Tensor:
        weights = (q[:, :, rows[part].flatten()].float() @ keys * q.shape[-1] ** -0.5).softmax(-1)
        sums = F.pad(weights, (0, -tokens % block)).unflatten(-1, (-1, block)).sum(-1)
        return sums.unflatten(2, (-1, rows.shape[1])).mean(3)

    mass = score_in_chunks(attend, len(probes), q.shape[0] * q.shape[1] * rows.shape[1] * tokens)
    mass = mass if blocks.index is None else mass[..., blocks.index]
    return mass / mass.sum(-1, keepdim=True).clamp(min=1e-30)


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """Return the Jensen-Shannon distance of distributions ``[..., V]``, ``[...]``, in natural logarithms."""
    entropy = lambda x: torch.special.entr(x).sum(-1)
    return (entropy((first + second) / 2) - (entropy(first) + entropy(second)) / 2).clamp(min=0).sqrt()


def line_attention(true: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean attention of the probe blocks ``true [B, H, P, V]`` on the blocks of every column ``[B, H, V]``
    and of every diagonal ``[B, H, 2 V - 1]``, from the lowest offset to the highest."""
    columns = true.shape[-1]
    diagonals, seen = true.new_zeros(*true.shape[:2], 2 * columns - 1), torch.zeros(2 * columns - 1)
    for row, probe in enumerate(probes.tolist()):
        offsets = slice(columns - 1 - probe, 2 * columns - 1 - probe)
        diagonals[..., offsets] += true[:, :, row]
        seen[offsets] += 1
    other = (probes[:, None] != torch.arange(columns)).to(true.device, true.dtype)
    return (true * other).sum(2) / other.sum(0).clamp(min=1), diagonals / seen.to(true.device)


def to_pairs(columns: Tensor, diagonals: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values of columns and of diagonals for all pairs of blocks, ``[B, H, 1, V]`` and ``[B, H, V, V]``."""
    position = torch.arange(columns.shape[-1], device=columns.device)
    return columns[..., None, :], diagonals[..., position - position[:, None] + len(position) - 1]


def mass_before(mass: Tensor) -> Tensor:
    """Return the share of the greater entries of ``mass [..., V]`` at every entry, ``[..., V]``."""
    mass = mass.double()
    ordered, index = mass.sort(dim=-1, descending=True, stable=True)
    before = (ordered.cumsum(-1) - ordered) / ordered.sum(-1, keepdim=True).clamp(min=1e-30)
    return torch.zeros_like(before).scatter_(-1, index, before)
