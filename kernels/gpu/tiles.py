"""What the Triton kernels are made of: fetching rows, one step of the running softmax, writing rows back.

Rows of head_dim columns are tuples of tiles, as wide as WIDTHS says (`architectures.widths`). Triton's tiles are powers
of two; and without the matrix units of Hopper the sums of a program must not be wider than it has queries, for Triton
lays its warps over the longer side of a product. Over the columns each warp would see only a part of every row, and the
running maximum would go through shared memory, behind barriers, at every step.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.constexpr_function
def width(widths, i):
    return widths[i]


@triton.constexpr_function
def first(widths, i):
    return sum(widths[:i])


@triton.jit
def tile(
    x,
    strides,
    item,
    head,
    start,
    end,
    ROWS: tl.constexpr,
    WIDTHS: tl.constexpr,
    i: tl.constexpr,
    TMA: tl.constexpr,
    CUT: tl.constexpr,
):
    """Tile i of ``x[item, head, start : start + ROWS]``, zero from ``end`` on where CUT is set. x: a tuple, of tensor
    descriptors of its tiles where TMA is set, else with a pointer in front."""
    if TMA:
        found = tl.reshape(x[i].load([item, head, start, first(WIDTHS, i)]), [ROWS, width(WIDTHS, i)])
        if CUT:  # padding may hold anything, even NaN, which a weight of zero would not hide
            found = tl.where((start + tl.arange(0, ROWS) < end)[:, None], found, tl.zeros_like(found))
    else:
        rows = start + tl.arange(0, ROWS)
        places = x[0] + begin(item, head, strides) + rows.to(tl.int64)[:, None] * strides[2]
        places += first(WIDTHS, i) + tl.arange(0, width(WIDTHS, i))[None, :]
        found = tl.load(places, mask=(rows < end)[:, None], other=0.0) if CUT else tl.load(places)
    return found


@triton.jit
def begin(item, head, strides):
    """Where an item's head begins; 64 bits, for tensors of more than 2**31 elements."""
    return item.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def before_end(kept, live, end, BLOCK: tl.constexpr):
    """How many of the ``live`` blocks of a list, which ascends, lie before ``end`` with all their keys."""
    whole = live
    while (whole > 0) and ((tl.load(kept + tl.maximum(whole - 1, 0)) + 1) * BLOCK > end):
        whole -= 1
    return whole


@triton.jit
def scattered(x, strides, item, head, token, real, WIDTHS: tl.constexpr):
    """The tiles of ``x[item, head, token]`` for tokens anywhere, zero where they are not real."""
    places = x + begin(item, head, strides) + token.to(tl.int64)[:, None] * strides[2]
    found = ()
    for i in tl.static_range(len(WIDTHS)):
        columns = first(WIDTHS, i) + tl.arange(0, width(WIDTHS, i))
        found = found + (tl.load(places + columns[None, :], mask=real[:, None], other=0.0),)
    return found


@triton.jit
def products(
    rows,
    x,
    strides,
    item,
    head,
    start,
    end,
    ROWS: tl.constexpr,
    WIDTHS: tl.constexpr,
    TMA: tl.constexpr,
    CUT: tl.constexpr,
):
    """Every row of a tuple of tiles times ``x[item, head, start : start + ROWS]``."""
    found = tl.dot(
        rows[0], tile(x, strides, item, head, start, end, ROWS, WIDTHS, 0, TMA, CUT).T, input_precision="ieee"
    )
    for i in tl.static_range(1, len(WIDTHS)):
        columns = tile(x, strides, item, head, start, end, ROWS, WIDTHS, i, TMA, CUT)
        found = tl.dot(rows[i], columns.T, found, input_precision="ieee")
    return found


@triton.jit
def nothing(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    """Before the first key: maximum, sum of weights, and weighted sums of the values of ROWS queries."""
    sums = ()
    for i in tl.static_range(len(WIDTHS)):
        sums = sums + (tl.zeros([ROWS, width(WIDTHS, i)], tl.float32),)
    return tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32), sums


@triton.jit
def visit(
    queries,
    k,
    v,
    k_strides,
    v_strides,
    item,
    head,
    start,
    end,
    scale,
    top,
    total,
    sums,
    KEYS: tl.constexpr,
    WIDTHS: tl.constexpr,
    TMA: tl.constexpr,
    CUT: tl.constexpr,
):
    """Take one tile of keys into the running softmax; CUT: hide those from ``end`` on, all of them perhaps. Base 2."""
    scores = products(queries, k, k_strides, item, head, start, end, KEYS, WIDTHS, TMA, CUT)
    if CUT:
        scores = tl.where((start + tl.arange(0, KEYS) < end)[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    base = higher
    if CUT:
        base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores * scale - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    added = ()
    for i in tl.static_range(len(WIDTHS)):
        values = tile(v, v_strides, item, head, start, end, KEYS, WIDTHS, i, TMA, CUT)
        shrunk = sums[i] * shrink[:, None]
        added = added + (tl.dot(weights.to(values.dtype), values, shrunk, input_precision="ieee"),)
    return higher, total, added


@triton.jit
def finish(
    out,
    lse,
    out_strides,
    item,
    head,
    heads,
    tokens,
    token,
    real,
    top,
    total,
    sums,
    WIDTHS: tl.constexpr,
):
    """Write the rows of the output and their LSE, natural, to where their tokens are."""
    share = tl.where(total > 0, 1 / total, 0.0)[:, None]
    rows = out + begin(item, head, out_strides) + token.to(tl.int64)[:, None] * out_strides[2]
    for i in tl.static_range(len(WIDTHS)):
        columns = first(WIDTHS, i) + tl.arange(0, width(WIDTHS, i))
        tl.store(rows + columns[None, :], (sums[i] * share).to(out.dtype.element_ty), mask=real[:, None])
    lse_row = lse + (item.to(tl.int64) * heads + head) * tokens
    tl.store(lse_row + token, (top + tl.log2(total)) * LN2, mask=real)
