"""The Triton program behind `permute`: rows of several tensors to their new places, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import begin


@triton.jit
def permute(
    sources,
    copies,
    order,
    source_strides,
    copy_strides,
    order_strides,
    group,
    heads,
    tokens,
    columns,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """ROWS rows of one head. Tuples, an entry a tensor: sources ``[B, H / group, N, D]``, copies ``[B, H, N, D]`` and
    their strides; order int64 ``[B, H, N]``."""
    program = tl.program_id(0)
    tiles = tl.cdiv(tokens, ROWS)
    tile, head, item = program % tiles, (program // tiles) % heads, program // (tiles * heads)
    place = tile * ROWS + tl.arange(0, ROWS)
    token = tl.load(order + begin(item, head, order_strides) + place, mask=place < tokens, other=0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = (place < tokens)[:, None] & (column < columns)[None, :]
    for i in tl.static_range(len(sources)):
        rows = sources[i] + begin(item, head // group, source_strides[i])
        found = tl.load(rows + token[:, None] * source_strides[i][2] + column[None, :], mask=inside)
        rows = copies[i] + begin(item, head, copy_strides[i])
        tl.store(rows + place.to(tl.int64)[:, None] * copy_strides[i][2] + column[None, :], found, mask=inside)
