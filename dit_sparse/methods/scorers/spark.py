"""Spark: keys above a threshold from the mean and the deviation of a row of scores, predicted by the first channels.

Source: C. You et al., "Spark Transformer: Reactivating Sparsity in FFN and Attention", arXiv:2506.06644, sec. 3. The
scores of the first r of D channels predict those of all. Instead of sorting a row of n scores x, the k largest are
those above

    theta(x) = mean(x) + std(x) Phi^-1(1 - k / n)

where Phi is the standard normal distribution. They keep k = 256 keys for each query and half of the channels.

Planning: N^2 D / 128 + N D^2 / 4 multiply-adds (mean queries of 64, half of the channels; their covariance).

Differs from the authors:
- Inference only: the first channels are those of a model that was not trained to predict with them. In video models
  they hold the part of RoPE that encodes frames.
- The query is the mean of a block, and a block of keys is kept if any of its keys exceeds the threshold: its score is
  the largest (x - mean(x)) / std(x) of its keys. Mean and deviation are those of the keys without text.
- With a density, the quantile Phi^-1(1 - k / n) is replaced by the number at which the kept blocks of a head meet it:
  rows are not normally distributed, and blocks are kept for one key. As theirs, rows keep different numbers.
- Their threshold is also subtracted from the kept scores, which changes the output of models not trained with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor

from ...budget import Above, Budget
from ...density import VideoBlocks
from ...grid import Site
from ...method import Scorer
from ...notation.settings import within
from ...scoring import pool, repeat_last_key, score_in_chunks


@dataclass(frozen=True, kw_only=True)
class Spark(Scorer):
    """Standardized scores of the first channels.

    Attributes:
        channels: r, as a fraction of the channels.
        keys: k, keys that a query keeps without a density.
    """

    selects_by_head: ClassVar[bool] = True

    channels: float = within("(0, 1]", 0.5)
    keys: int = within("[1, 1000000]", 256)

    def paper_budget(self, blocks: VideoBlocks) -> Budget:
        share = self.keys / max(1, blocks.tokens)
        return Above(NormalDist().inv_cdf(1 - share) if share < 1 else -torch.inf)

    def score(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Tensor:
        grid, block = site.grid, site.block
        q, k = (x[..., : max(1, round(self.channels * x.shape[-1]))] for x in (q, k))
        queries, keys = pool(q, block), repeat_last_key(k, block)
        video = k[:, :, grid.before : grid.before + grid.video].float()
        mean = video.mean(2, keepdim=True)

        def score_rows(rows: slice) -> Tensor:
            best = (queries[:, :, rows] @ (keys - mean).mT).unflatten(-1, (-1, block)).amax(-1)
            return best / deviation[:, :, rows].clamp(min=1e-12)

        centred = video - mean
        deviation = ((queries @ (centred.mT @ centred)) * queries).sum(-1, keepdim=True) / grid.video
        deviation = deviation.clamp(min=0).sqrt()
        return score_in_chunks(score_rows, queries.shape[2], q.shape[0] * q.shape[1] * keys.shape[2])
