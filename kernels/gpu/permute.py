"""Triton kernel of `kernels/permute.py`: permute the rows of several tensors in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import head_offset, split_program_id


@triton.jit
def permute_rows_kernel(
    sources,
    copies,
    order,
    source_strides,
    copy_strides,
    order_strides,
    group_size,
    heads,
    tokens,
    columns,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Copy ROWS rows of one head of every tensor.

    Args:
        sources: tuple of tensors ``[B, H / group_size, N, D]``.
        copies: tuple of tensors ``[B, H, N, D]``; row i receives row ``order[i]``.
        order: int64 ``[B, H, N]``.
        source_strides, copy_strides: tuples with the strides of each tensor.
        columns: D; at most WIDTH.
    """
    number, head, item = split_program_id(tl.program_id(0), tl.cdiv(tokens, ROWS), heads)
    position = number * ROWS + tl.arange(0, ROWS)
    valid = position < tokens
    token = tl.load(order + head_offset(item, head, order_strides) + position, mask=valid, other=0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = valid[:, None] & (column < columns)[None, :]
    for i in tl.static_range(len(sources)):
        source = sources[i] + head_offset(item, head // group_size, source_strides[i])
        values = tl.load(source + token[:, None] * source_strides[i][2] + column[None, :], mask=mask)
        copy = copies[i] + head_offset(item, head, copy_strides[i])
        tl.store(copy + position.to(tl.int64)[:, None] * copy_strides[i][2] + column[None, :], values, mask=mask)
