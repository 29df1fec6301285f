"""DHSA: scores between chunks of variable length, whose boundaries are found from the attention to neighbours.

Source: S. Xiong et al., "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs",
arXiv:2510.24606. With the attention L_n of token n to the w tokens before it and R_n to the w tokens after it, a chunk
starts at n if

    max(L_n, R_n) / min(L_n, R_n) >= 1.1

and no token within ``spacing`` has a larger ratio. A chunk c of |c| tokens is represented by the means of its queries
and of its keys, times sqrt(|c|), which compensates for the smaller length of means of more tokens. The scores between
chunks,

    S_cd = sqrt(|c| |d|) mean(Q_c) . mean(K_d) / sqrt(D)

are upsampled: pairs of tokens have the score of their chunks, and those with the highest scores are kept.

Planning: N^2 D / 64 + 24 N D multiply-adds (at most 8 chunks in a block).

Differs from the authors:
- Blocks are kept, not tokens: a block has the best score of its pairs of tokens. Chunks also end where blocks end, so
  that blocks consist of whole chunks.
- Boundaries follow the rule directly. In the paper it labels the training data of a small network that predicts them.
- Boundaries are common to all heads, found from the mean over heads of L and R. Scores are those of each head; theirs
  are averaged, but heads of video models differ more than those of language models.
- The mean of all keys is subtracted, so that the scores of long chunks do not depend on an offset of all keys.
- Without a density, 25 % of the blocks are kept; their budget is a number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...grid import Site
from ...method import Scorer
from ...notation.settings import within
from ...scoring import score_in_chunks, split_blocks


@dataclass(frozen=True, kw_only=True)
class DHSA(Scorer):
    """Scores between chunks.

    Attributes:
        window: w, neighbours on each side that boundaries are found from.
        threshold: smallest ratio at a boundary.
        spacing: tokens on each side within which a boundary has the largest ratio.
    """

    window: int = within("[1, 64]", 4)
    threshold: float = within("[1, 1000000]", 1.1)
    spacing: int = within("[1, 1024]", 8)

    def score(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Tensor:
        k = k.float() - k.float().mean(2, keepdim=True)
        member = self._chunks(q.float(), k, site.block)  # [B, 1, Qb, chunks, block]
        sizes = member.sum(-1)
        queries, keys = (member @ split_blocks(x, site.block) / sizes.clamp(min=1).sqrt()[..., None] for x in (q, k))
        empty, (blocks, n) = (sizes == 0)[..., None], sizes.shape[2:]  # they repeat the first chunk of their block
        queries, keys = (torch.where(empty, x[..., :1, :], x) for x in (queries * q.shape[-1] ** -0.5, keys))

        def score_rows(rows: slice) -> Tensor:
            scores = queries[:, :, rows].flatten(2, 3) @ keys.flatten(2, 3).mT
            return scores.unflatten(-1, (blocks, n)).amax(-1).unflatten(2, (-1, n)).amax(3)

        return score_in_chunks(score_rows, blocks, q.shape[0] * q.shape[1] * n**2 * blocks)

    def _chunks(self, q: Tensor, k: Tensor, block: int) -> Tensor:
        """Return which tokens of a block are in each of its chunks, float32 ``[B, 1, Qb, chunks, block]``."""
        tokens = q.shape[2]
        ratio = self._ratios(q, k)
        largest = F.max_pool1d(F.pad(ratio, (self.spacing, self.spacing)), self.spacing, 1)  # of each run of tokens
        before, after = largest[..., :tokens], largest[..., self.spacing + 1 :]
        is_start = (ratio >= self.threshold) & (ratio > before) & (ratio >= after)
        starts = F.pad(is_start, (0, -tokens % block)).unflatten(-1, (-1, block))
        starts = starts & (torch.arange(block, device=q.device) > 0)
        number = starts.cumsum(-1)
        most = 1 + -(-(block - 1) // (self.spacing + 1))
        member = number[..., None, :] == torch.arange(most, device=q.device)[:, None]
        real = F.pad(torch.ones_like(ratio[:1], dtype=torch.bool), (0, -tokens % block)).unflatten(-1, (-1, 1, block))
        return (member & real)[:, None].float()

    def _ratios(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the ratio at every token, at least 1, ``[B, N]``."""
        tokens, w = q.shape[2], self.window
        if tokens <= 2 * w:
            return torch.ones(len(q), tokens, device=q.device)
        centre = q[:, :, w : tokens - w] * q.shape[-1] ** -0.5
        offsets = (*range(-w, 0), *range(1, w + 1))
        logits = torch.stack([(centre * k[:, :, w + at : tokens - w + at]).sum(-1) for at in offsets])
        left = logits.softmax(0)[:w].sum(0).mean(1)
        ratio = torch.maximum(left, 1 - left) / torch.minimum(left, 1 - left).clamp(min=1e-9)
        return F.pad(ratio, (w, w), value=1.0)
