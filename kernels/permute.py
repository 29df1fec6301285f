"""Permute the tokens of several tensors; on a GPU in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.order import reorder
from dit_sparse.plan import num_blocks

from .gpu import launching

PROGRAM_BYTES = 1 << 14  # bytes that one program copies from each tensor


def permute_tokens(order: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return copies of the tensors whose position i holds token ``order[..., i]``.

    Args:
        order: int64 ``[N]`` or ``[B|1, H|1, N]``. None: the tensors are returned unchanged.
        tensors: ``[B, H, N, D]``, of equal shapes. Heads are repeated if there are fewer than orders.
    """
    if order is None:
        return tensors
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if needs_grad or not launching.prefers_triton(tensors[0]):
        return tuple(reorder(x, order) for x in tensors)
    from .gpu.permute import permute_rows_kernel

    arguments, copies = launch_arguments(order, tensors)
    batch, heads, tokens, _ = copies[0].shape
    with torch.cuda.device_of(tensors[0]):
        permute_rows_kernel[(batch * heads * num_blocks(tokens, arguments["ROWS"]),)](**arguments)
    return copies


def launch_arguments(order: Tensor, tensors: tuple[Tensor, ...]) -> tuple[dict, tuple[Tensor, ...]]:
    """Return the arguments of the kernel, and its outputs."""
    tensors = tuple(launching.with_contiguous_rows(*tensors))
    batch, key_heads, tokens, dim = tensors[0].shape
    heads = key_heads if order.ndim == 1 else max(key_heads, order.shape[1])
    copies = tuple(x.new_empty(batch, heads, tokens, dim) for x in tensors)
    order = order.expand(batch, heads, -1)
    width = 1 << (dim - 1).bit_length()
    arguments = dict(
        sources=tensors,
        copies=copies,
        order=order,
        source_strides=tuple(x.stride()[:3] for x in tensors),
        copy_strides=tuple(x.stride()[:3] for x in copies),
        order_strides=order.stride()[:2],
        group_size=heads // key_heads,
        heads=heads,
        tokens=tokens,
        columns=dim,
        ROWS=max(1, min(128, PROGRAM_BYTES // (width * tensors[0].element_size()))),
        WIDTH=width,
        num_warps=4,
    )
    return arguments, copies
