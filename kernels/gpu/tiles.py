"""Building blocks of the Triton kernels: loading rows, one step of the online softmax, storing rows.

A row of head_dim columns is a tuple of tiles whose column counts are WIDTHS (`architectures.split_head_dim`), because
the sides of Triton's tiles are powers of two. Without the matrix units of Hopper, a tile of the output must not be
wider than the program has queries: Triton distributes the warps of a product over its longer side. With the warps over
the columns, each warp holds a part of every row, and the running maximum goes through shared memory, with barriers in
every step.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.constexpr_function
def tile_width(widths, i):
    return widths[i]


@triton.constexpr_function
def tile_offset(widths, i):
    return sum(widths[:i])


@triton.jit
def split_program_id(program, per_head, heads):
    """Return the number within its head, head and batch item of a program; every head has ``per_head`` programs."""
    return program % per_head, (program // per_head) % heads, program // (per_head * heads)


@triton.jit
def head_offset(item, head, strides):
    """Return the offset of a head, in 64 bits for tensors of more than 2**31 elements."""
    return item.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def load_tokens(order, strides, item, head, position, valid):
    """Return the tokens at positions of an order ``[B, H, N]``, or the positions themselves if the order is None."""
    token = position
    if order is not None:
        token = tl.load(order + item * strides[0] + head * strides[1] + position, mask=valid, other=0)
    return token


@triton.jit
def load_length(lengths, item, tokens):
    """Return the number of tokens of a batch item without padding."""
    length = tokens
    if lengths is not None:
        length = tl.load(lengths + item)
    return length


@triton.jit
def load_index_row(index, index_strides, count, count_strides, item, head, query_block):
    """Return the pointer to the key blocks that a query block keeps, and their number."""
    row = index + item * index_strides[0] + head * index_strides[1] + query_block * index_strides[2]
    kept = tl.load(count + item * count_strides[0] + head * count_strides[1] + query_block * count_strides[2])
    return row, kept


@triton.jit
def count_full_blocks(index_row, kept, end, BLOCK: tl.constexpr):
    """Return how many of the ``kept`` blocks of an ascending row have all their keys before ``end``."""
    full = kept
    while (full > 0) and ((tl.load(index_row + tl.maximum(full - 1, 0)) + 1) * BLOCK > end):
        full -= 1
    return full


@triton.jit
def load_tile(
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
    MASKED: tl.constexpr,
):
    """Load column tile i of ``x[item, head, start : start + ROWS]``; with MASKED, rows from ``end`` on are zero.

    ``x`` is a tuple: with TMA the tensor descriptors of the tiles, otherwise the pointer first.
    """
    if TMA:
        values = tl.reshape(x[i].load([item, head, start, tile_offset(WIDTHS, i)]), [ROWS, tile_width(WIDTHS, i)])
        if MASKED:  # padding may hold NaN, which a weight of zero would not remove
            values = tl.where((start + tl.arange(0, ROWS) < end)[:, None], values, tl.zeros_like(values))
    else:
        rows = start + tl.arange(0, ROWS)
        pointers = x[0] + head_offset(item, head, strides) + rows.to(tl.int64)[:, None] * strides[2]
        pointers += tile_offset(WIDTHS, i) + tl.arange(0, tile_width(WIDTHS, i))[None, :]
        values = tl.load(pointers, mask=(rows < end)[:, None], other=0.0) if MASKED else tl.load(pointers)
    return values


@triton.jit
def gather_rows(x, strides, item, head, token, valid, WIDTHS: tl.constexpr):
    """Load the column tiles of ``x[item, head, token]``; rows that are not valid are zero."""
    pointers = x + head_offset(item, head, strides) + token.to(tl.int64)[:, None] * strides[2]
    tiles = ()
    for i in tl.static_range(len(WIDTHS)):
        columns = tile_offset(WIDTHS, i) + tl.arange(0, tile_width(WIDTHS, i))
        tiles = tiles + (tl.load(pointers + columns[None, :], mask=valid[:, None], other=0.0),)
    return tiles


@triton.jit
def zero_rows(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    """Return float32 column tiles of zeros."""
    tiles = ()
    for i in tl.static_range(len(WIDTHS)):
        tiles = tiles + (tl.zeros([ROWS, tile_width(WIDTHS, i)], tl.float32),)
    return tiles


@triton.jit
def dot_rows(
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
    MASKED: tl.constexpr,
):
    """Return the dot products of ``rows``, a tuple of column tiles, and ``x[item, head, start : start + ROWS]``."""
    first = load_tile(x, strides, item, head, start, end, ROWS, WIDTHS, 0, TMA, MASKED)
    scores = tl.dot(rows[0], first.T, input_precision="ieee")
    for i in tl.static_range(1, len(WIDTHS)):
        columns = load_tile(x, strides, item, head, start, end, ROWS, WIDTHS, i, TMA, MASKED)
        scores = tl.dot(rows[i], columns.T, scores, input_precision="ieee")
    return scores


@triton.jit
def init_softmax(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    """Return the state of the online softmax of ROWS queries before the first key: running maximum, sum of weights and
    weighted sum of values."""
    return tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32), zero_rows(ROWS, WIDTHS)


@triton.jit
def update_softmax(
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
    row_max,
    row_sum,
    acc,
    KEYS: tl.constexpr,
    WIDTHS: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
    bias=None,
):
    """Add KEYS keys from ``start`` to the online softmax, in base 2, and return its new state.

    With MASKED, keys from ``end`` on are hidden, which may be all of them. A ``bias [KEYS]``, in base 2, is added to
    the scores of each key; -inf hides it.
    """
    scores = dot_rows(queries, k, k_strides, item, head, start, end, KEYS, WIDTHS, TMA, MASKED)
    if MASKED:
        scores = tl.where((start + tl.arange(0, KEYS) < end)[None, :], scores, float("-inf"))
    factor = scale
    if bias is not None:
        scores, factor = scores * scale + bias[None, :], 1.0
    new_max = tl.maximum(row_max, tl.max(scores, 1) * factor)
    base = new_max
    if MASKED:
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores * factor - base[:, None])
    rescale = tl.exp2(row_max - base)
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    new_acc = ()
    for i in tl.static_range(len(WIDTHS)):
        values = load_tile(v, v_strides, item, head, start, end, KEYS, WIDTHS, i, TMA, MASKED)
        rescaled = acc[i] * rescale[:, None]
        new_acc = new_acc + (tl.dot(weights.to(values.dtype), values, rescaled, input_precision="ieee"),)
    return new_max, row_sum, new_acc


@triton.jit
def update_softmax_by_tail(
    queries,
    k,
    v,
    log_sizes,
    groups,
    kept,
    k_strides,
    v_strides,
    log_sizes_strides,
    groups_strides,
    kept_strides,
    item,
    head,
    query_group,
    group_size,
    terms,
    scale,
    row_max,
    row_sum,
    acc,
    KEYS: tl.constexpr,
    WIDTHS: tl.constexpr,
):
    """Add the pooled terms of the key groups that a query group does not keep to the online softmax.

    Args:
        k, v: means of the terms, ``[B, H / group_size, G, D]``.
        log_sizes: base-2 logarithm of the tokens of each term, ``[B, H, G]``; -inf for none.
        groups: key group of each term, int32 ``[B, H, G]``.
        kept: which key groups each query group keeps, int8 ``[B, H, Q, Qk]``.
        terms: G.
    """
    log_sizes_row = log_sizes + head_offset(item, head, log_sizes_strides)
    groups_row = groups + head_offset(item, head, groups_strides)
    kept_row = kept + head_offset(item, head, kept_strides) + query_group.to(tl.int64) * kept_strides[2]
    TERMS: tl.constexpr = min(KEYS, 64)  # tiles of 128 terms spill on Hopper, because they are loaded by pointers
    for start in range(0, terms, TERMS):
        term = start + tl.arange(0, TERMS)
        bias = tl.load(log_sizes_row + term, mask=term < terms, other=float("-inf"))
        group = tl.load(groups_row + term, mask=term < terms, other=0)
        bias = tl.where(tl.load(kept_row + group) != 0, float("-inf"), bias)
        row_max, row_sum, acc = update_softmax(
            queries, (k, k), (v, v), k_strides, v_strides, item, head // group_size, start, terms, scale,
            row_max, row_sum, acc, TERMS, WIDTHS, False, True, bias,
        )  # fmt: skip
    return row_max, row_sum, acc


@triton.jit
def store_output(
    out,
    lse,
    out_strides,
    item,
    head,
    heads,
    tokens,
    token,
    valid,
    row_max,
    row_sum,
    acc,
    WIDTHS: tl.constexpr,
):
    """Store the normalized output and the natural log-sum-exp of the queries ``token``."""
    factor = tl.where(row_sum > 0, 1 / row_sum, 0.0)[:, None]
    pointers = out + head_offset(item, head, out_strides) + token.to(tl.int64)[:, None] * out_strides[2]
    for i in tl.static_range(len(WIDTHS)):
        columns = tile_offset(WIDTHS, i) + tl.arange(0, tile_width(WIDTHS, i))
        tl.store(pointers + columns[None, :], (acc[i] * factor).to(out.dtype.element_ty), mask=valid[:, None])
    lse_row = lse + (item.to(tl.int64) * heads + head) * tokens
    tl.store(lse_row + token, (row_max + tl.log2(row_sum)) * LN2, mask=valid)
