"""What methods that look at q and k share: blocks as means, and scores made a few query blocks at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .grid import Grid
from .plan import num_blocks

SCORES_PER_CHUNK = 1 << 23


def split_blocks(x: Tensor, block: int) -> Tensor:
    """``[B, H, N, D] -> [B, H, Qb, block, D]``, float32, the ragged last block filled up with zeros."""
    return F.pad(x.float(), (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))


def pool(x: Tensor, block: int) -> Tensor:
    """Mean of every block, ``[B, H, N, D] -> [B, H, Qb, D]``, float32; the ragged last block over what it holds."""
    tokens = x.shape[2]
    sizes = (tokens - torch.arange(num_blocks(tokens, block), device=x.device) * block).clamp(max=block)
    return split_blocks(x, block).sum(3) / sizes[:, None]


def score_in_chunks(score: Callable[[slice], Tensor], blocks: int, per_block: int) -> Tensor:
    """``score(blocks) -> [B, H, len, Qb]`` for a few query blocks at a time, put together: ``[B, H, Qb, Qb]``. A block
    makes ``per_block`` numbers on the way, which bounds the memory of a chunk."""
    step = max(1, SCORES_PER_CHUNK // per_block)
    return torch.cat([score(slice(first, min(first + step, blocks))) for first in range(0, blocks, step)], 2)


def sampled_attention(q: Tensor, k: Tensor, grid: Grid, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Some random queries of the video ``[S]`` and what they attend to, float32 ``[B, H, S, N]``."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(grid.before, grid.before + grid.video, (samples,), generator=generator).to(q.device)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1).float()
    return rows, (q[:, :, rows].float() @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


def merge_attention(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from attention over each: out ``[B, H, N, D]`` and lse ``[B, H, N]``, in
    float32. A set without keys has lse -inf."""
    total = torch.logaddexp(lse, other_lse)
    safe = total.nan_to_num(neginf=0.0)
    first, second = ((one - safe).exp()[..., None] for one in (lse, other_lse))
    return first * out.float() + second * other.float(), total
