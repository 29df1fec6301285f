"""What methods that look at q and k share: blocks as means, and scores made a few query blocks at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .plan import blocks_in

SCORES_PER_CHUNK = 1 << 23


def in_blocks(x: Tensor, block: int) -> Tensor:
    """``[B, H, N, D] -> [B, H, Qb, block, D]``, float32, the ragged last block filled up with zeros."""
    return F.pad(x.float(), (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))


def pool(x: Tensor, block: int) -> Tensor:
    """Mean of every block, ``[B, H, N, D] -> [B, H, Qb, D]``, float32; the ragged last block over what it holds."""
    tokens = x.shape[2]
    sizes = (tokens - torch.arange(blocks_in(tokens, block), device=x.device) * block).clamp(max=block)
    return in_blocks(x, block).sum(3) / sizes[:, None]


def by_query_blocks(score: Callable[[slice], Tensor], blocks: int, per_block: int) -> Tensor:
    """``score(blocks) -> [B, H, len, Qb]`` for a few query blocks at a time, put together: ``[B, H, Qb, Qb]``. A block
    makes ``per_block`` numbers on the way, which bounds the memory of a chunk."""
    step = max(1, SCORES_PER_CHUNK // per_block)
    return torch.cat([score(slice(first, min(first + step, blocks))) for first in range(0, blocks, step)], 2)
