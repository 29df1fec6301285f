"""Sub-block scores: the attention between two blocks, estimated from a few means inside each.

Source: the backend "subblock_sparse" of SGLang's diffusion engine, https://github.com/sgl-project/sglang. A block is
cut into n parts; with a and b running over the means of the parts of a query block and of a key block,

    s_ij = log sum_a sum_b exp(a . b / sqrt(D))

which is the log of the mass that the means predict. The best blocks of every row are kept.

Differs from the authors: the parts of a ragged last block are weighed by what they hold, and scores are float32, whose
ties in bfloat16 they found to favour early blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grid import Site
from ..method import Scorer
from ..scoring import pool, score_in_chunks


@dataclass(frozen=True, kw_only=True)
class SubBlock(Scorer):
    """Log-sum-exp over the means of parts.

    Attributes:
        parts: n, into how many parts a block is cut; divides the block.
    """

    parts: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts < 1:
            raise ValueError(f"parts is into how many parts a block is cut, at least 1, not {self.parts}")

    def score(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Tensor:
        tokens, dim = q.shape[2:]
        if site.block % self.parts:
            raise ValueError(f"parts must divide the block of {site.block} tokens, not {self.parts}")
        size = site.block // self.parts
        means = [pool(x, size) for x in (q, k)]
        short = -means[0].shape[2] % self.parts
        queries, keys = (F.pad(x, (0, 0, 0, short)).unflatten(2, (-1, self.parts)) for x in means)
        blocks = keys.shape[2]
        held = (tokens - torch.arange(blocks * self.parts, device=q.device) * size).clamp(0, size)
        log_held = held.float().log()  # -inf: nothing

        def estimate(part: slice) -> Tensor:
            rows = log_held.view(blocks, self.parts)[part].flatten()
            logits = queries[:, :, part].flatten(2, 3) @ keys.flatten(2, 3).mT * dim**-0.5
            logits = (logits + rows[:, None] + log_held).unflatten(-1, (blocks, self.parts))
            return logits.logsumexp(-1).unflatten(2, (-1, self.parts)).logsumexp(3)

        return score_in_chunks(estimate, blocks, q.shape[0] * q.shape[1] * self.parts**2 * blocks)
