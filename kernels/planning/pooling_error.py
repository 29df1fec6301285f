"""Error of replacing the keys of a tile by their mean: estimates for every pair of a query block and a tile.

Queries and keys are cut into blocks of ``rows`` and tiles of ``columns`` consecutive tokens. With the mean key m_j, the
variance s_j of each channel and the n_j keys of tile j, a pooled term gives each of its keys the weight of m_j.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.kernels import cpu_library
from dit_sparse.kernels.executors import block_sparse
from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.gpu.architectures import Architecture, split_head_dim
from dit_sparse.plan import num_blocks

KEYS = 64  # pooled terms or keys of one step of a Triton kernel
QUERIES = 128  # sampled queries of one program
MAX_HEAD_DIM = 128  # of the Triton kernels


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
    if _supports_triton(q, k, rows, columns):
        return _mass_and_spread_triton(q, k, rows, columns, spread)
    if _uses_cpu_operators(q):
        q, k = _for_cpu_operators(q, k)
        return torch.ops.dit_sparse_pooling_error.mass_and_spread(q, k, rows, columns, spread, q.shape[-1] ** -0.5)
    return _mass_and_spread_torch(*_for_torch(q, k), rows, columns, spread)


def _mass_and_spread_torch(q: Tensor, k: Tensor, rows: int, columns: int, spread: bool) -> Tensor:
    scale = q.shape[-1] ** -0.5
    (mean, variance), size = _tile_statistics(k, columns), _tile_sizes(k, columns)
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
    if _supports_triton(q, k, rows, columns):
        return _pooling_error_triton(q, k, rows, columns, sampled)
    if _uses_cpu_operators(q):
        q, k = _for_cpu_operators(q, k)
        return torch.ops.dit_sparse_pooling_error.pooling_error(q, k, rows, columns, sampled, q.shape[-1] ** -0.5)
    return _pooling_error_torch(*_for_torch(q, k), rows, columns, sampled)


def _supports_triton(q: Tensor, k: Tensor, rows: int, columns: int) -> bool:
    """Return whether the Triton kernels compute the scores: for query blocks and key tiles of powers of two."""
    fits = rows in block_sparse.BLOCKS and KEYS % columns == 0 and q.shape[-1] <= MAX_HEAD_DIM
    return launching.prefers_triton(q) and fits and launching.why_not(q.detach(), k.detach()) is None


def _mass_and_spread_triton(q: Tensor, k: Tensor, rows: int, columns: int, spread: bool) -> Tensor:
    from dit_sparse.kernels.gpu.pooling_error import mass_and_spread_kernel

    architecture = launching.device_architecture(q.device)
    arguments, out = spread_arguments(q, k, rows, columns, spread, architecture)
    with torch.cuda.device_of(q):
        mass_and_spread_kernel[(out.shape[:3].numel(),)](**arguments)
    return out


def spread_arguments(
    q: Tensor, k: Tensor, rows: int, columns: int, spread: bool, architecture: Architecture
) -> tuple[dict, Tensor]:
    """Return the arguments of `mass_and_spread_kernel`, and its output."""
    (q,), dim = launching.with_contiguous_rows(q), q.shape[-1]
    means, variances = (x.to(q.dtype) for x in _tile_statistics(k.float(), columns))
    out = torch.empty(*q.shape[:2], num_blocks(q.shape[2], rows), means.shape[2], device=q.device)
    arguments = dict(
        q=q,
        means=means,
        variances=variances,
        log_sizes=_tile_sizes(k, columns).log2(),
        out=out,
        q_strides=q.stride()[:3],
        means_strides=means.stride()[:3],
        heads=q.shape[1],
        group_size=q.shape[1] // k.shape[1],
        tokens=q.shape[2],
        terms=means.shape[2],
        scale=launching.base_2_scale(None, dim),
        square_scale=1 / dim,
        BLOCK=rows,
        KEYS=KEYS // 2 if rows == 128 and dim > 64 else KEYS,  # as much as fits in the shared memory of sm89 and sm120
        WIDTHS=split_head_dim(dim, 64),
        SPREAD=spread,
        num_warps=8 if rows == 128 else 4,
        num_stages=3 if dim <= 64 or architecture.shared_memory > 65_536 else 2,
    )
    return arguments, out


def _pooling_error_triton(q: Tensor, k: Tensor, rows: int, columns: int, sampled: Tensor) -> Tensor:
    from dit_sparse.kernels.gpu.pooling_error import pooling_error_kernel

    arguments, out = error_arguments(q, k, rows, columns, sampled)
    groups = num_blocks(out.shape[2], arguments["BLOCKS"])
    with torch.cuda.device_of(q):
        pooling_error_kernel[(out.shape[:2].numel() * groups,)](**arguments)
    return out


def error_arguments(q: Tensor, k: Tensor, rows: int, columns: int, sampled: Tensor) -> tuple[dict, Tensor]:
    """Return the arguments of `pooling_error_kernel`, and its output."""
    (q, k), dim = launching.with_contiguous_rows(q, k), q.shape[-1]
    blocks, tiles = num_blocks(q.shape[2], rows), num_blocks(k.shape[2], columns)
    samples = 1 << (len(sampled) - 1).bit_length()
    out = torch.empty(*q.shape[:2], blocks, tiles, device=q.device)
    arguments = dict(
        q=q,
        k=k,
        sampled=sampled.int(),
        out=out,
        q_strides=q.stride()[:3],
        k_strides=k.stride()[:3],
        heads=q.shape[1],
        group_size=q.shape[1] // k.shape[1],
        tokens=q.shape[2],
        block=rows,
        samples=len(sampled),
        tiles=tiles,
        scale=launching.base_2_scale(None, dim),
        BLOCKS=max(1, QUERIES // samples),
        SAMPLES=samples,
        COLUMNS=columns,
        KEYS=KEYS,
        WIDTHS=split_head_dim(dim, 64),
        num_warps=8,
        num_stages=3,
    )
    return arguments, out


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


def _tile_statistics(k: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance of every channel of the keys of every tile, ``[B, H, T, D]`` each."""
    mean = _tile_means(k, size)
    centred = k - mean.repeat_interleave(size, 2)[:, :, : k.shape[2]]
    return mean, _tile_means(centred.square(), size)


def _tile_means(x: Tensor, size: int) -> Tensor:
    tiles = F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))
    return tiles.sum(3) / _tile_sizes(x, size)[:, None]


def _by_blocks(score: Callable[[slice], Tensor], q: Tensor, rows: int, per_block: int) -> Tensor:
    """Concatenate the scores of a few query blocks at a time, each of which takes ``per_block`` values in a head."""
    blocks = num_blocks(q.shape[2], rows)
    step = max(1, launching.chunk_elements(q) // (q.shape[:2].numel() * per_block))
    return torch.cat([score(slice(i, min(i + step, blocks))) for i in range(0, blocks, step)], 2)
