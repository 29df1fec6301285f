"""Functions for methods that score q and k: block means, sampled attention, scores in chunks, drift of queries."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .grid import Grid, Site
from .plan import num_blocks

SCORES_PER_CHUNK = 1 << 22


def split_blocks(x: Tensor, block: int) -> Tensor:
    """Return ``x [B, H, N, D]`` as blocks ``[B, H, Qb, block, D]`` in float32, padded with zeros."""
    missing = -x.shape[2] % block
    x = F.pad(x.float(), (0, 0, 0, missing)) if missing else x.float()  # a padding of 0 tokens would be a copy
    return x.unflatten(2, (-1, block))


def without_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """Return ``x [B, H, N, D]`` with zeros as padding, so that plans do not depend on its values."""
    position = torch.arange(x.shape[2], device=x.device)
    return x.masked_fill((position >= lengths.to(x.device)[:, None])[:, None, :, None], 0.0)


def pool(x: Tensor, block: int) -> Tensor:
    """Return the mean of every block, ``[B, H, N, D] -> [B, H, Qb, D]``, in float32."""
    rest = x.shape[2] % block
    whole = x[:, :, : x.shape[2] - rest].unflatten(2, (-1, block)).sum(3, dtype=torch.float32) / block
    return torch.cat([whole, x[:, :, -rest:].mean(2, True, dtype=torch.float32)], 2) if rest else whole


def sample_positions(tokens: int, block: int, count: int) -> Tensor:
    """Return the positions of ``count`` tokens of each block, or of all if it holds fewer, ``[Qb, S]``, ascending.

    They are spread by the golden ratio, because an even spacing may hit the same column of every image row. A shorter
    last block repeats its last token.
    """
    within = (
        torch.arange(block) if count >= block else (torch.arange(count) * 0.618034 % 1 * block).long().sort().values
    )
    return (torch.arange(num_blocks(tokens, block))[:, None] * block + within).clamp(max=tokens - 1)


def sample_queries(q: Tensor, block: int, count: int) -> Tensor:
    """Return the queries at `sample_positions`, float32 ``[B, H, Qb, S, D]``."""
    position = sample_positions(q.shape[2], block, count)
    return q[:, :, position.flatten().to(q.device)].float().unflatten(2, position.shape)


def repeat_last_key(k: Tensor, block: int) -> Tensor:
    """Return ``k [B, H, N, D]`` in float32 with its last key repeated up to a whole number of blocks, which leaves the
    maximum over the keys of a block unchanged."""
    return torch.cat([k, k[:, :, -1:].expand(-1, -1, -k.shape[2] % block, -1)], 2).float()


def subblock_means(x: Tensor, block: int, n: int) -> Tensor:
    """Return the means of n sub-blocks of every block in float32, ``[B, H, N, D] -> [B, H, n, Qb, D]``; 0 if empty.

    Sub-blocks come before blocks, because reductions over a short last dimension are slow.
    """
    means = pool(x, block // n)
    return F.pad(means, (0, 0, 0, -means.shape[2] % n)).unflatten(2, (-1, n)).transpose(2, 3)


def log_share_of_last_subblocks(tokens: int, block: int, n: int, device: torch.device) -> Tensor:
    """Return the log of the tokens that each sub-block of the last block holds, relative to a whole one, ``[n]``."""
    first = (num_blocks(tokens, block) - 1) * block
    sizes = tokens - first - torch.arange(n, device=device) * (block // n)
    return (sizes.clamp(0, block // n) / (block // n)).log()


def score_in_chunks(score: Callable[[slice], Tensor], blocks: int, per_block: int) -> Tensor:
    """Concatenate the scores of a few query blocks at a time to ``[B, H, Qb, Qb]``, which bounds the memory.

    Args:
        score: takes a slice of query blocks, returns their scores ``[B, H, len, Qb]``.
        blocks: number of query blocks.
        per_block: intermediate values that ``score`` allocates for each query block.
    """
    step = max(1, SCORES_PER_CHUNK // per_block)
    return torch.cat([score(slice(first, min(first + step, blocks))) for first in range(0, blocks, step)], 2)


def sampled_attention(
    q: Tensor, k: Tensor, grid: Grid, samples: int, seed: int, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the numbers of random video queries ``[S]`` and their attention weights, float32 ``[B, H, S, N]``; keys
    that are ``hidden``, bool ``[B|1, H|1, N]``, get none."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(grid.before, grid.before + grid.video, (samples,), generator=generator).to(q.device)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1).float()
    logits = q[:, :, rows].float() @ k.mT * q.shape[-1] ** -0.5
    if hidden is None:
        return rows, logits.softmax(-1)
    return rows, logits.masked_fill(hidden[:, :, None], -torch.inf).softmax(-1).nan_to_num(0.0)


def attention_received(
    q: Tensor, k: Tensor, site: Site, samples: int, seed: int, hidden: Tensor | None = None
) -> Tensor:
    """Return the attention that each key block receives from random video queries, float32 ``[B, H, Qb]``.

    Args:
        samples, seed: number of queries, and the seed that draws them.
        hidden: key blocks that the queries do not see, bool ``[B|1, H|1, Qb]``.
    """
    if hidden is not None:
        hidden = hidden.repeat_interleave(site.block, -1)[..., : q.shape[2]]
    _, weights = sampled_attention(q, k, site.grid, samples, seed, hidden)
    weights = F.pad(weights.sum(2), (0, -weights.shape[-1] % site.block))
    return weights.unflatten(-1, (-1, site.block)).sum(-1)


def check_queries_per_block(queries: int | None, block: int) -> None:
    """Raise ValueError if a sample of that many queries, None: all, is not evenly spaced in every block."""
    if block % min(queries or 1, block):
        raise ValueError(f"queries_per_block must divide the block of {block}, got {queries}")


class QueryDrift:
    """Drift of queries since a plan was made.

    The drift of a call is compared with the limit at the next call, when it has long been computed, so that no call
    waits for the device.

    Args:
        means: block means of the queries that the plan was made from, ``[B, H, Qb, D]``.
    """

    def __init__(self, means: Tensor) -> None:
        self._means = means
        self._last: _DelayedNumber | None = None

    def exceeds(self, limit: float, means: Tensor) -> bool:
        """Return whether the drift of the previous call exceeded the limit, and start to measure that of this call:
        1 - cosine similarity to the means of the plan, averaged over blocks."""
        last, drift = self._last, 1 - F.cosine_similarity(means, self._means, -1)
        self._last = _DelayedNumber(drift.mean())
        return last is not None and last.read() > limit


class _DelayedNumber:
    """A number on a GPU that is copied to the host in the background; on other devices, the tensor."""

    def __init__(self, value: Tensor) -> None:
        self._value, self._copied = value, None
        if value.is_cuda:
            with torch.cuda.device_of(value):
                host = torch.empty((), dtype=value.dtype, pin_memory=True)
                self._value = host.copy_(value, non_blocking=True)
                self._copied = torch.cuda.Event()
                self._copied.record()

    def read(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._value)
