"""SALE: a block is kept if the 4-bit estimate of a score is high relative to the attention on sink and local keys.

Source: X. Ji et al., "SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling",
arXiv:2505.24179, sec. 3. The log-sum-exp L_r of query r over its local window and the first keys ("sink") is exact. All
other scores are estimated from queries and keys of 4 bits, which are integers in [-7, 7] with one scale per token,
after their means are subtracted. A block is kept if it holds a query r and a key c with

    exp(s_rc - L_r)  >=  tau

The threshold tau is calibrated for each head: from 0.008 it is halved until the output error of the kept blocks is
below a limit. A head that needs less than 1e-4 stays dense.

Planning: N^2 D / 16 multiply-adds (every 16th query, all keys).

Differs from the authors:
- The local window is the own block and its two neighbours; the sink is the text and the first 32 tokens of the video.
  They enter L; of them, text and the own block are always kept.
- ``queries_per_block`` queries of each block are estimated, not all. Products of 4-bit integers are computed in
  floating point, which is exact; on a GPU their kernel is faster.
- The error is relative: the L1 norm of the difference of the output over that of the output, on 64 queries of the first
  plan. Their limits are absolute numbers for single language models.
- With a density, tau is solved for each head instead, so that the kept blocks of the head meet it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...budget import Above, Budget
from ...grid import Blocks, Grid, Site
from ...method import Scorer
from ...notation.settings import within
from ...scoring import repeat_last_key, sample_queries, score_in_chunks, split_blocks

THRESHOLDS = [0.008 / 2**n for n in range(7)]  # down to 1e-4
SINK, PROBES = 32, 64


@dataclass(frozen=True, kw_only=True)
class SALE(Scorer):
    """4-bit estimates relative to sink and local keys. Scores are log(exp(s - L) / tau).

    Attributes:
        queries_per_block: queries of each block that are estimated.
        max_error: relative output error up to which tau is halved, without a density or budget.
    """

    default_budget: ClassVar[Budget] = Above(0.0)
    selects_by_head: ClassVar[bool] = True

    queries_per_block: int = within("[1, 256]", 4)
    max_error: float = within("(0, 1]", 0.1)

    @property
    def needs_values(self) -> bool:
        return self.density is None and self.budget is None

    def score(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Tensor:
        queries, block, scale = sample_queries(q, site.block, self.queries_per_block), site.block, q.shape[-1] ** -0.5
        k = k.float() - k.float().mean(2, keepdim=True)
        lse = local_and_sink_lse(queries * scale, k, site.grid, block)
        mean = q.float().mean(2, keepdim=True)
        estimates = round_to_4_bits(queries - mean[:, :, None]) * scale
        estimates = torch.cat([estimates, torch.ones_like(estimates[..., :1])], -1)
        keys = repeat_last_key(torch.cat([round_to_4_bits(k), k @ mean.mT * scale], -1), block)
        samples = queries.shape[3]

        def score_rows(rows: slice) -> Tensor:
            best = (estimates[:, :, rows].flatten(2, 3) @ keys.mT).unflatten(-1, (-1, block)).amax(-1)
            return (best.unflatten(2, (-1, samples)) - lse[:, :, rows, :, None]).amax(3)

        scores = score_in_chunks(score_rows, queries.shape[2], q.shape[0] * q.shape[1] * samples * keys.shape[2])
        if not self.needs_values:
            return scores
        if "threshold" not in memory:
            memory["threshold"] = self._calibrate(scores, q, k, v, site)
        return scores - memory["threshold"][..., None, None]

    def _calibrate(self, scores: Tensor, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Return log(tau) of each head ``[B, H]``: the greatest of `THRESHOLDS` with a small error, or -inf."""
        grid, block = site.grid, site.block
        rows = torch.linspace(grid.before, grid.before + grid.video - 1, min(PROBES, grid.video)).long().to(q.device)
        weights = (q[:, :, rows].float() @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        dense, v, key = weights @ v.float(), v.float(), torch.arange(grid.tokens, device=q.device)
        row, column, has_text = rows // block, key // block, Blocks.from_grid(grid, block).text.to(q.device)
        always = (has_text | (torch.arange(len(has_text), device=q.device) == row[:, None]))[:, column]
        always, scores = always | has_text[row, None], scores[:, :, row][..., column]
        threshold = torch.full(scores.shape[:2], -torch.inf, device=q.device)
        for tau in reversed(THRESHOLDS):
            kept = weights * ((scores > math.log(tau)) | always)
            difference = kept @ v / kept.sum(-1, keepdim=True).clamp(min=1e-30) - dense
            error = difference.abs().sum((-2, -1)) / dense.abs().sum((-2, -1)).clamp(min=1e-30)
            threshold = torch.where(error < self.max_error, math.log(tau), threshold)
        return threshold


def round_to_4_bits(x: Tensor) -> Tensor:
    """Return ``x [..., D]`` with every token rounded to integers in [-7, 7] times its own scale."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 7
    return (x / scale).round() * scale


def local_and_sink_lse(queries: Tensor, k: Tensor, grid: Grid, block: int) -> Tensor:
    """Return the log-sum-exp of the products of sampled queries ``[B, H, Qb, S, D]`` with text, the first tokens of the
    video, the own block and its neighbours, ``[B, H, Qb, S]``."""
    blocks = queries.shape[2]
    row, within = torch.arange(blocks, device=k.device)[:, None], torch.arange(block, device=k.device)
    padded, sums = F.pad(split_blocks(k, block), (0, 0, 0, 0, 1, 1)), []
    for shift in (-1, 0, 1):
        key = (row + shift) * block + within
        logits = queries @ padded[:, :, 1 + shift : 1 + shift + blocks].mT
        sums.append(logits.masked_fill(((key < 0) | (key >= grid.tokens))[:, None], -torch.inf).logsumexp(-1))
    sink = torch.arange(grid.tokens, device=k.device)
    end = grid.before + grid.video
    sink = torch.cat([sink[: min(grid.before + SINK, end)], sink[end:]])
    logits = queries @ k[:, :, None, sink].mT
    is_local = (sink // block - row).abs() <= 1
    sums.append(logits.masked_fill(is_local[:, None], -torch.inf).logsumexp(-1))
    return torch.stack(sums).logsumexp(0)
