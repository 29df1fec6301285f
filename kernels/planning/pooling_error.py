"""How much is lost by replacing the keys of a tile by their mean: estimates for every pair of a query block and a tile.

Queries and keys are cut into blocks of ``rows`` and tiles of ``columns`` consecutive tokens. With the mean key m_j, the
variance s_j of each channel and the n_j keys of tile j, a pooled term gives each of its keys the weight of m_j.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.kernels import cpu_library
from dit_sparse.kernels.gpu import launching
from dit_sparse.plan import num_blocks


def mass_and_spread(q: Tensor, k: Tensor, rows: int, columns: int, spread: bool = True) -> Tensor:
    """Return the mean over the queries q of a block of  w_qj (q^2 . s_j) / D,  with the softmax w over the logits
    q . m_j / sqrt(D) + log n_j  of all pooled terms: the mass of a tile times the variance of its logits.

    Args:
        q, k: ``[B, H, N, D]`` and ``[B, Hkv, N, D]``; Hkv divides H.
        rows, columns: tokens of a query block and of a key tile.
        spread: whether to multiply by the variance; otherwise the mean mass is returned.

    Returns:
        float32 ``[B, H, ceil(N / rows), ceil(N / columns)]``.
    """
    if _uses_cpu_operators(q):
        q, k = _for_cpu_operators(q, k)
        return torch.ops.dit_sparse_pooling_error.mass_and_spread(q, k, rows, columns, spread, q.shape[-1] ** -0.5)
    return _mass_and_spread_torch(*_for_torch(q, k), rows, columns, spread)


def _mass_and_spread_torch(q: Tensor, k: Tensor, rows: int, columns: int, spread: bool) -> Tensor:
    scale = q.shape[-1] ** -0.5
    mean, size = _tile_means(k, columns), _tile_sizes(k, columns)
    variance = (_tile_means(k.square(), columns) - mean.square()).clamp(min=0)
    count = _tile_sizes(q, rows)

    def score(blocks: slice) -> Tensor:
        queries = q[:, :, blocks.start * rows : blocks.stop * rows]
        weight = torch.add(size.log(), queries @ mean.mT, alpha=scale).softmax(-1)
        if spread:
            weight = weight * (queries.square() @ variance.mT) * scale**2
        total = F.pad(weight, (0, 0, 0, -queries.shape[2] % rows)).unflatten(2, (-1, rows)).sum(3)
        return total / count[blocks, None]

    return _by_blocks(score, q, rows, rows * mean.shape[2])


def pooling_error(q: Tensor, k: Tensor, rows: int, columns: int, every: int) -> Tensor:
    """Return the mean over some queries r of a block of  | p_rn - exp(r . m_j / sqrt(D) - L_r) |_2  over the keys n of
    tile j, where p is exact attention and L its log-sum-exp.

    Args:
        q, k: ``[B, H, N, D]`` and ``[B, Hkv, N, D]``; Hkv divides H.
        rows, columns: tokens of a query block and of a key tile.
        every: one of this many consecutive queries is used, whose place among them changes.

    Returns:
        float32 ``[B, H, ceil(N / rows), ceil(N / columns)]``.
    """
    number = torch.arange(num_blocks(rows, every), device=q.device)
    sampled = (number * every + number * 5 % every).clamp(max=rows - 1)
    if _uses_cpu_operators(q):
        q, k = _for_cpu_operators(q, k)
        return torch.ops.dit_sparse_pooling_error.pooling_error(q, k, rows, columns, sampled, q.shape[-1] ** -0.5)
    return _pooling_error_torch(*_for_torch(q, k), rows, columns, sampled)


def _uses_cpu_operators(q: Tensor) -> bool:
    return q.device.type == "cpu" and cpu_library.why_not("pooling_error") is None


def _for_cpu_operators(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors in float32 with a contiguous last dimension."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in (x.float() for x in tensors)]


def _for_torch(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys in float32, with a key head for every query head."""
    return q.float(), k.repeat_interleave(q.shape[1] // k.shape[1], 1).float()


def _pooling_error_torch(q: Tensor, k: Tensor, rows: int, columns: int, sampled: Tensor) -> Tensor:
    tokens, scale, mean = q.shape[2], q.shape[-1] ** -0.5, _tile_means(k, columns)

    def score(blocks: slice) -> Tensor:
        first = torch.arange(blocks.start, blocks.stop, device=q.device)[:, None] * rows
        queries = q[:, :, (first + sampled).clamp(max=tokens - 1).flatten()]
        logits = queries @ k.mT * scale
        lse = logits.logsumexp(-1, keepdim=True)
        pooled = (queries @ mean.mT * scale - lse).exp().repeat_interleave(columns, -1)[..., :tokens]
        squared = ((logits - lse).exp() - pooled).square()
        error = F.pad(squared, (0, -tokens % columns)).unflatten(-1, (-1, columns)).sum(-1).sqrt()
        return error.unflatten(2, (-1, len(sampled))).mean(3)

    return _by_blocks(score, q, rows, len(sampled) * tokens)


def _tile_sizes(x: Tensor, size: int) -> Tensor:
    starts = torch.arange(num_blocks(x.shape[2], size), device=x.device) * size
    return (x.shape[2] - starts).clamp(max=size).float()


def _tile_means(x: Tensor, size: int) -> Tensor:
    tiles = F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))
    return tiles.sum(3) / _tile_sizes(x, size)[:, None]


def _by_blocks(score: Callable[[slice], Tensor], q: Tensor, rows: int, per_block: int) -> Tensor:
    """Concatenate the scores of a few query blocks at a time, each of which takes ``per_block`` values in a head."""
    blocks = num_blocks(q.shape[2], rows)
    step = max(1, launching.chunk_elements(q) // (q.shape[:2].numel() * per_block))
    return torch.cat([score(slice(i, min(i + step, blocks))) for i in range(0, blocks, step)], 2)
