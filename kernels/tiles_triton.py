"""How the Triton kernels fetch: a tile of rows from ``[B, H, N, D]``, by pointers or by a tensor descriptor."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile(
    x,
    strides,
    item,
    head,
    start,
    end,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
    CUT: tl.constexpr,
):
    """``x[item, head, start : start + ROWS, FIRST : FIRST + COLUMNS]``, zero from ``end`` on where CUT is set."""
    if TMA:
        found = tl.reshape(x.load([item, head, start, FIRST]), [ROWS, COLUMNS])
        if CUT:  # padding may hold anything, even NaN, which a weight of zero would not hide
            found = tl.where((start + tl.arange(0, ROWS) < end)[:, None], found, tl.zeros_like(found))
    else:
        rows = start + tl.arange(0, ROWS)
        places = x + begin(item, head, strides) + rows.to(tl.int64)[:, None] * strides[2]
        places += FIRST + tl.arange(0, COLUMNS)[None, :]
        found = tl.load(places, mask=(rows < end)[:, None], other=0.0) if CUT else tl.load(places)
    return found


@triton.jit
def begin(item, head, strides):
    """Where an item's head begins; 64 bits, for tensors of more than 2**31 elements."""
    return item.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
