"""Tensors brought into an order, all in one launch on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.plan import num_blocks, reorder

from .gpu import launching

ROW_BYTES = 1 << 14  # what one program moves of each tensor


def permuted(order: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Every tensor so that place i holds token ``order[..., i]``.

    Args:
        order: int64 ``[N]`` or ``[B|1, H|1, N]``; None leaves everything as it is.
        tensors: ``[B, H, N, D]``, all of one shape. Fewer heads than there are orders are repeated for them.
    """
    if order is None:
        return tensors
    by_triton = launching.preferred(tensors[0])
    if not by_triton or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return tuple(reorder(x, order) for x in tensors)
    from .gpu.permute import permute

    arguments = launch(order, tensors)
    batch, heads, tokens, _ = arguments["copies"][0].shape
    with torch.cuda.device_of(tensors[0]):
        permute[(batch * heads * num_blocks(tokens, arguments["ROWS"]),)](**arguments)
    return arguments["copies"]


def launch(order: Tensor, tensors: tuple[Tensor, ...]) -> dict:
    """The arguments of the kernel; ``copies`` are what it will fill."""
    tensors = tuple(launching.in_rows(*tensors))
    batch, key_heads, tokens, dim = tensors[0].shape
    heads = key_heads if order.ndim == 1 else max(key_heads, order.shape[1])
    copies = tuple(x.new_empty(batch, heads, tokens, dim) for x in tensors)
    order = order.expand(batch, heads, -1)
    width = 1 << (dim - 1).bit_length()
    return dict(
        sources=tensors,
        copies=copies,
        order=order,
        source_strides=tuple(x.stride()[:3] for x in tensors),
        copy_strides=tuple(x.stride()[:3] for x in copies),
        order_strides=order.stride()[:2],
        group=heads // key_heads,
        heads=heads,
        tokens=tokens,
        columns=dim,
        ROWS=max(1, min(128, ROW_BYTES // (width * tensors[0].element_size()))),
        WIDTH=width,
        num_warps=4,
    )
