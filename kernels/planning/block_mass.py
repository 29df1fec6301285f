"""Exact attention mass of blocks, from queries, keys and a log-sum-exp (LSE).

With a known LSE, an attention weight is one exponential, ``exp(scale q.k - lse)``, so one pass over q and k gives the
mass that a search needs, with half the matrix products of attention and without values. AdaSpa (arXiv:2502.21079)
reuses the LSE of an earlier step. An LSE of another step multiplies every row by a constant, which dividing by the
row's sum removes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.kernels.executors import block_sparse
from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.gpu.architectures import Architecture, split_head_dim
from dit_sparse.kernels.permute import permute_tokens
from dit_sparse.order import reorder
from dit_sparse.plan import Plan, num_blocks

MIN_ROWS = 16  # the fewest rows of a matrix product in Triton


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block: int,
    *,
    rows: int | None = None,
    order: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return the mean attention mass from the queries of each block to each key block.

    Args:
        q, k: ``[B, H, N, D]`` and ``[B, Hkv, N, D]``; Hkv divides H.
        lse: natural log-sum-exp of the scores of every query, float32 ``[B, H, N]``.
        block: tokens in a block.
        rows: evenly spaced queries to sample from each block; divides ``block``. None: all.
        order, lengths: as in `Plan`. Padding has no mass, as queries and as keys.
        scale: of the scores; None: ``D ** -0.5``.

    Returns:
        float32 ``[B, H, Qb, Qb]``. If the LSE is that of all scores, each row sums to 1; rows of blocks that hold only
        padding are 0.

    Raises:
        ValueError: ``rows`` does not divide ``block``.
    """
    rows = _validate_rows(rows, block)
    if _supports_triton(q, k, block, rows):
        return _block_mass_triton(q, k, lse, block, rows, order, lengths, scale, None)
    return _block_mass_torch(q, k, lse, block, rows, order, lengths, scale)[0]


def block_mass_and_lse(
    q: Tensor, k: Tensor, block: int, *, rows: int | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return `block_mass` without a known LSE, and the LSE of the sampled queries, float32 ``[B, H, N]``, 0 for the
    other queries. Takes one pass over the scores in PyTorch, and two in Triton."""
    rows = _validate_rows(rows, block)
    stride = block // rows
    if _supports_triton(q, k, block, rows):
        lse = log_sum_exp(q, k, scale, every=stride)
        return _block_mass_triton(q, k, lse, block, rows, None, None, scale, None), lse
    mass, sampled_lse = _block_mass_torch(q, k, None, block, rows, None, None, scale)
    lse = torch.zeros(q.shape[:3], device=q.device)
    lse[:, :, ::stride] = sampled_lse
    return mass, lse


def retained_mass(
    q: Tensor, k: Tensor, lse: Tensor, plan: Plan, *, rows: int | None = None, scale: float | None = None
) -> Tensor:
    """Return the mean attention mass from the queries of each block to all blocks that a plan keeps, float32
    ``[B, H, Qb]``. Arguments are as for `block_mass`. Triton computes only kept blocks."""
    rows = _validate_rows(rows, plan.block)
    if _supports_triton(q, k, plan.block, rows):
        return _block_mass_triton(q, k, lse, plan.block, rows, plan.order, plan.lengths, scale, plan)
    mass, _ = _block_mass_torch(q, k, lse, plan.block, rows, plan.order, plan.lengths, scale)
    return (mass * plan.block_mask()).sum(-1)


def log_sum_exp(q: Tensor, k: Tensor, scale: float | None = None, every: int = 1) -> Tensor:
    """Return the natural log-sum-exp of the scores of every ``every``-th query, and 0 for the other queries.

    Takes one pass over the scores of ``q [B, H, N, D]`` and ``k [B, Hkv, N, D]``; returns float32 ``[B, H, N]``.
    """
    if every > 1:
        lse = torch.zeros(q.shape[:3], device=q.device)
        lse[:, :, ::every] = log_sum_exp(q[:, :, ::every], k, scale)
        return lse
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):  # no public function of PyTorch returns the LSE
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, k, scale=scale)[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chunk = max(1, launching.chunk_elements(q) // (q.shape[0] * q.shape[1] * k.shape[2]))
    keys = k.float().mT
    return torch.cat([(part.float() @ keys * scale).logsumexp(-1) for part in q.split(chunk, 2)], 2)


def _validate_rows(rows: int | None, block: int) -> int:
    if rows is not None and (rows < 1 or block % rows):
        raise ValueError(f"rows must divide the block of {block} tokens, got {rows}")
    return rows or block


def _supports_triton(q: Tensor, k: Tensor, block: int, rows: int) -> bool:
    if not launching.prefers_triton(q) or rows < MIN_ROWS:
        return False
    return block_sparse.why_not(q.detach(), k.detach(), Plan(q, q, q.shape[2], block)) is None


def _block_mass_torch(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    block: int,
    rows: int,
    order: Tensor | None,
    lengths: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the block mass, computed for several query blocks at once; and without ``lse``, the LSE of the sampled
    queries, ``[B, H, ceil(N / (block / rows))]``."""
    batch, heads, tokens, dim = q.shape
    stride, blocks = block // rows, num_blocks(tokens, block)
    q, k, lse = (x if x is None else reorder(x, order) for x in (q, k, lse))
    q = q[:, :, ::stride].float() * (dim**-0.5 if scale is None else scale)
    missing = -tokens % block
    keys = F.pad(k.repeat_interleave(heads // k.shape[1], 1).float(), (0, 0, 0, missing)).mT
    if lse is not None:
        lse = lse[:, :, ::stride]
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # weights of a query without keys: exp(score - inf) = 0
    end = torch.full((1,), tokens, device=q.device) if lengths is None else lengths
    valid_keys = (torch.arange(tokens + missing, device=q.device) < end[:, None])[:, None]
    valid_queries = valid_keys[..., :tokens:stride]
    elements = launching.chunk_elements(q) * (1 if q.is_cuda else 4)  # on a CPU, products of fewer rows are slow
    chunk = rows * max(1, elements // (batch * heads * rows * tokens))
    mass, lse_chunks = [], []
    for first in range(0, q.shape[2], chunk):
        queries = slice(first, first + chunk)
        scores = q[:, :, queries] @ keys
        scores[..., tokens:] = -torch.inf
        shift = scores.amax(-1, keepdim=True) if lse is None else lse[:, :, queries, None]
        weights = scores.sub_(shift).exp_()
        if lengths is not None:
            weights = torch.where(valid_queries[..., queries, None] & valid_keys[..., None, :], weights, 0.0)
        block_sums = weights.unflatten(-1, (blocks, block)).sum(-1)
        if lse is None:
            total = block_sums.sum(-1, keepdim=True)
            lse_chunks.append((shift + total.log())[..., 0])
            block_sums = block_sums / total
        mass.append(F.pad(block_sums, (0, 0, 0, -block_sums.shape[2] % rows)).unflatten(2, (-1, rows)).sum(3))
    num_queries = F.pad(valid_queries.float(), (0, -q.shape[2] % rows)).unflatten(-1, (blocks, rows)).sum(-1)
    return torch.cat(mass, 2) / num_queries.clamp(min=1)[..., None], torch.cat(lse_chunks, 2) if lse_chunks else None


def _block_mass_triton(q, k, lse, block, rows, order, lengths, scale, plan) -> Tensor:
    from dit_sparse.kernels.gpu.block_mass import block_mass_kernel

    architecture = launching.device_architecture(q.device)
    arguments, out = launch_arguments(q, k, lse, block, rows, order, lengths, scale, plan, architecture)
    with torch.cuda.device_of(q):
        block_mass_kernel[(out.shape[0] * out.shape[1] * out.shape[2],)](**arguments)
    return out


def launch_arguments(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block: int,
    rows: int,
    order: Tensor | None,
    lengths: Tensor | None,
    scale: float | None,
    plan: Plan | None,
    architecture: Architecture,
) -> tuple[dict, Tensor]:
    """Return the arguments of the kernel, and its output: the mass of every block, or of the blocks that ``plan``
    keeps."""
    batch, heads, tokens, dim = q.shape
    blocks, widths, tiling = num_blocks(tokens, block), split_head_dim(dim, dim), architecture.tiling(block, dim)
    q, k = launching.with_contiguous_rows(q, *permute_tokens(order, k))
    out = torch.empty(batch, heads, blocks, *(() if plan else (blocks,)), device=q.device)
    index = plan.index.expand(batch, heads, -1, -1) if plan else None
    count = plan.count.expand(batch, heads, -1) if plan else None
    order = None if order is None else order.expand(batch, heads, -1)
    arguments = dict(
        launching.pointers_or_descriptors({"k": k}, tiling.keys, widths, tiling.tma),
        q=q,
        lse=lse.contiguous(),
        out=out,
        index=index,
        count=count,
        order=order,
        lengths=lengths,
        q_strides=q.stride()[:3],
        k_strides=k.stride()[:3],
        index_strides=index.stride()[:3] if plan else (0, 0, 0),
        count_strides=count.stride() if plan else (0, 0, 0),
        order_strides=(0, 0) if order is None else order.stride()[:2],
        heads=heads,
        group_size=heads // k.shape[1],
        tokens=tokens,
        scale=launching.base_2_scale(scale, dim),
        BLOCK=block,
        ROWS=rows,
        KEYS=tiling.keys,
        WIDTHS=widths,
        TMA=tiling.tma,
        num_warps=tiling.warps if rows >= 64 else 4,
        num_stages=tiling.stages if tiling.tma or dim <= 128 else 1,  # the column tiles of one step load concurrently
    )
    return arguments, out
