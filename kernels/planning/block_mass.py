"""How much attention every block receives, exactly, from queries, keys and a log-sum-exp that is at hand already.

With the LSE known, a weight is one exponential, ``exp(scale q.k - lse)``. One pass over q and k gives what a search
needs (AdaSpa, arXiv:2502.21079, keeps the LSE of an earlier step): half the products of attention, and no values.
An LSE of another step scales every row by a factor of its own, which dividing by the row's sum removes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.kernels.executors import block_sparse
from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.gpu.architectures import widths
from dit_sparse.kernels.permute import permuted
from dit_sparse.plan import Plan, num_blocks, reorder

FEWEST_ROWS = 16  # that matrix units take


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
    """Mean attention that the queries of each block pay to each key block.

    Args:
        q, k: ``[B, H, N, D]`` and ``[B, Hkv, N, D]``, Hkv divides H.
        lse: natural-log-sum-exp of the scores of every query, float32 ``[B, H, N]``.
        block: tokens in a block.
        rows: how many queries of each block are looked at, evenly spaced; divides the block. None: all.
        order, lengths: as in `Plan`. Padding neither pays nor receives.
        scale: of the scores; None: ``D ** -0.5``.

    Returns:
        float32 ``[B, H, Qb, Qb]``. Every row sums to one where the LSE is that of all scores; blocks of nothing but
        padding give rows of zeros.

    Raises:
        ValueError: ``rows`` does not divide ``block``.
    """
    rows = _checked(rows, block)
    if _by_triton(q, k, block, rows):
        return _launched(q, k, lse, block, rows, order, lengths, scale, None)
    return _plain(q, k, lse, block, rows, order, lengths, scale)[0]


def first_block_mass(
    q: Tensor, k: Tensor, block: int, *, rows: int | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """`block_mass` where no log-sum-exp is at hand yet, and the one that it found: that of the queries looked at, 0 for
    the others, float32 ``[B, H, N]``. One pass over the scores in plain PyTorch, two on a GPU."""
    rows = _checked(rows, block)
    apart = block // rows
    if _by_triton(q, k, block, rows):
        lse = log_sum_exp(q, k, scale, every=apart)
        return _launched(q, k, lse, block, rows, None, None, scale, None), lse
    mass, found = _plain(q, k, None, block, rows, None, None, scale)
    lse = torch.zeros(q.shape[:3], device=q.device)
    lse[:, :, ::apart] = found
    return mass, lse


def retained_mass(
    q: Tensor, k: Tensor, lse: Tensor, plan: Plan, *, rows: int | None = None, scale: float | None = None
) -> Tensor:
    """Mean attention that the queries of each block pay to all blocks that a plan keeps: float32 ``[B, H, Qb]``.

    Arguments as for `block_mass`; on a GPU only kept blocks are computed.
    """
    rows = _checked(rows, plan.block)
    if _by_triton(q, k, plan.block, rows):
        return _launched(q, k, lse, plan.block, rows, plan.order, plan.lengths, scale, plan)
    mass, _ = _plain(q, k, lse, plan.block, rows, plan.order, plan.lengths, scale)
    return (mass * plan.block_mask()).sum(-1)


def log_sum_exp(q: Tensor, k: Tensor, scale: float | None = None, every: int = 1) -> Tensor:
    """Natural-log-sum-exp of the scores of every query, or of each ``every``-th and 0 for the others: of
    ``q [B, H, N, D]`` and ``k [B, Hkv, N, D]``, float32 ``[B, H, N]``. One more pass over the scores, for those who
    have none at hand."""
    if every > 1:
        result = torch.zeros(q.shape[:3], device=q.device)
        result[:, :, ::every] = log_sum_exp(q[:, :, ::every], k, scale)
        return result
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):  # what no public function of PyTorch returns
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, k, scale=scale)[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chunk = max(1, launching.scores_at_once(q) // (q.shape[0] * q.shape[1] * k.shape[2]))
    keys = k.float().mT
    return torch.cat([(part.float() @ keys * scale).logsumexp(-1) for part in q.split(chunk, 2)], 2)


def _checked(rows: int | None, block: int) -> int:
    if rows is not None and (rows < 1 or block % rows):
        raise ValueError(f"rows must divide the block of {block} tokens, not {rows}")
    return rows or block


def _by_triton(q: Tensor, k: Tensor, block: int, rows: int) -> bool:
    if not launching.preferred(q) or rows < FEWEST_ROWS:
        return False
    return block_sparse.why_not(q.detach(), k.detach(), Plan(q, q, q.shape[2], block)) is None


def _plain(q, k, lse, block, rows, order, lengths, scale) -> tuple[Tensor, Tensor | None]:
    """The definition, a few query blocks at a time; and, where no log-sum-exp is given, that of the queries looked at,
    ``[B, H, ceil(N / (block / rows))]``."""
    batch, heads, tokens, dim = q.shape
    apart, blocks = block // rows, num_blocks(tokens, block)
    q, k, lse = (x if x is None else reorder(x, order) for x in (q, k, lse))
    q = q[:, :, ::apart].float() * (dim**-0.5 if scale is None else scale)
    keys = k.repeat_interleave(heads // k.shape[1], 1).float().mT
    if lse is not None:
        lse = lse[:, :, ::apart]
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # who sees nothing pays nothing: exp(score - inf) is 0
    end = torch.full((1,), tokens, device=q.device) if lengths is None else lengths
    real = (torch.arange(tokens, device=q.device) < end[:, None])[:, None]
    real_rows = real[..., ::apart]
    at_once = rows * max(1, launching.scores_at_once(q) // (batch * heads * rows * tokens))
    mass, found = [], []
    for first in range(0, q.shape[2], at_once):
        some = slice(first, first + at_once)
        scores = q[:, :, some] @ keys
        if lse is None:
            weights = scores.softmax(-1)
            found.append(scores.amax(-1) - weights.amax(-1).log())
        else:
            weights = scores.sub_(lse[:, :, some, None]).exp_()
        if lengths is not None:
            weights = torch.where(real_rows[..., some, None] & real[..., None, :], weights, 0.0)
        by_block = F.pad(weights, (0, 0, 0, -weights.shape[2] % rows)).unflatten(2, (-1, rows)).sum(3)
        mass.append(F.pad(by_block, (0, -tokens % block)).unflatten(-1, (blocks, block)).sum(-1))
    measured_steps = F.pad(real_rows.float(), (0, -q.shape[2] % rows)).unflatten(-1, (blocks, rows)).sum(-1)
    return torch.cat(mass, 2) / measured_steps.clamp(min=1)[..., None], torch.cat(found, 2) if found else None


def _launched(q, k, lse, block, rows, order, lengths, scale, plan) -> Tensor:
    from dit_sparse.kernels.gpu.block_mass import mass

    arguments, out = launch(q, k, lse, block, rows, order, lengths, scale, plan, launching.machine(q.device))
    with torch.cuda.device_of(q):
        mass[(out.shape[0] * out.shape[1] * out.shape[2],)](**arguments)
    return out


def launch(q, k, lse, block, rows, order, lengths, scale, plan, machine) -> tuple[dict, Tensor]:
    """The arguments of the kernel, and the tensor that it will fill."""
    batch, heads, tokens, dim = q.shape
    blocks, columns, tiling = num_blocks(tokens, block), widths(dim, dim), machine.tiling(block, dim)
    q, k = launching.in_rows(q, *permuted(order, k))
    out = torch.empty(batch, heads, blocks, *(() if plan else (blocks,)), device=q.device)
    index = plan.index.expand(batch, heads, -1, -1) if plan else None
    count = plan.count.expand(batch, heads, -1) if plan else None
    order = None if order is None else order.expand(batch, heads, -1)
    arguments = dict(
        launching.fetched({"k": k}, tiling.keys, columns, tiling.tma),
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
        group=heads // k.shape[1],
        tokens=tokens,
        scale=(dim**-0.5 if scale is None else scale) * math.log2(math.e),
        BLOCK=block,
        ROWS=rows,
        KEYS=tiling.keys,
        WIDTHS=columns,
        TMA=tiling.tma,
        num_warps=tiling.warps if rows >= 64 else 4,
        num_stages=tiling.stages if tiling.tma or dim <= 128 else 1,  # several tiles a step are in flight already
    )
    return arguments, out
