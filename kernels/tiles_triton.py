"""What the Triton kernels are made of: fetching rows, one step of the running softmax, writing rows back.

Head sizes that are no power of two are cut in two columns of tiles, 80 = 64 + 16 and 96 = 64 + 32; `rest` names the
second one, and WIDTH_REST = 0 leaves it out.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


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


@triton.jit
def scattered(x, strides, item, head, token, real, FIRST: tl.constexpr, COLUMNS: tl.constexpr):
    """``x[item, head, token, FIRST : FIRST + COLUMNS]`` for tokens anywhere, zero where they are not real."""
    places = x + begin(item, head, strides) + token.to(tl.int64)[:, None] * strides[2]
    return tl.load(places + FIRST + tl.arange(0, COLUMNS)[None, :], mask=real[:, None], other=0.0)


@triton.jit
def visit(
    queries,
    queries_rest,
    k,
    v,
    k_rest,
    v_rest,
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
    sums_rest,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_REST: tl.constexpr,
    TMA: tl.constexpr,
    CUT: tl.constexpr,
):
    """Take one tile of keys into the running softmax; CUT: hide those from ``end`` on, all of them perhaps. Base 2."""
    keys = tile(k, k_strides, item, head, start, end, 0, KEYS, WIDTH, TMA, CUT)
    scores = tl.dot(queries, keys.T, input_precision="ieee")
    if WIDTH_REST:
        keys_rest = tile(k_rest, k_strides, item, head, start, end, WIDTH, KEYS, WIDTH_REST, TMA, CUT)
        scores = tl.dot(queries_rest, keys_rest.T, scores, input_precision="ieee")
    if CUT:
        scores = tl.where((start + tl.arange(0, KEYS) < end)[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    base = higher
    if CUT:
        base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores * scale - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    values = tile(v, v_strides, item, head, start, end, 0, KEYS, WIDTH, TMA, CUT)
    weights = weights.to(values.dtype)
    sums = tl.dot(weights, values, sums * shrink[:, None], input_precision="ieee")
    if WIDTH_REST:
        values_rest = tile(v_rest, v_strides, item, head, start, end, WIDTH, KEYS, WIDTH_REST, TMA, CUT)
        sums_rest = tl.dot(weights, values_rest, sums_rest * shrink[:, None], input_precision="ieee")
    return higher, total, sums, sums_rest


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
    sums_rest,
    WIDTH: tl.constexpr,
    WIDTH_REST: tl.constexpr,
):
    """Write the rows of the output and their LSE, natural, to where their tokens are."""
    share = tl.where(total > 0, 1 / total, 0.0)[:, None]
    out_rows = out + begin(item, head, out_strides) + token.to(tl.int64)[:, None] * out_strides[2]
    kind = out.dtype.element_ty
    tl.store(out_rows + tl.arange(0, WIDTH)[None, :], (sums * share).to(kind), mask=real[:, None])
    if WIDTH_REST:
        columns = WIDTH + tl.arange(0, WIDTH_REST)
        tl.store(out_rows + columns[None, :], (sums_rest * share).to(kind), mask=real[:, None])
    lse_row = lse + (item.to(tl.int64) * heads + head) * tokens
    tl.store(lse_row + token, (top + tl.log2(total)) * LN2, mask=real)
