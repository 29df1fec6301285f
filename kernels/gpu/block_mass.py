"""The Triton program behind `block_mass`: what one query block pays to each key block, in one pass over the keys."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import before_end, products, scattered

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def mass(
    q,
    k,
    k_rest,
    lse,
    out,
    index,
    count,
    order,
    lengths,
    q_strides,
    k_strides,
    index_strides,
    count_strides,
    order_strides,
    heads,
    group,
    tokens,
    scale,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTHS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Mean mass of ROWS queries of one block, evenly spaced.

    Pointers as in `block_sparse_triton.forward`, and lse float32 ``[B, H, N]``; out float32 ``[B, H, Qb, Qb]``, or
    ``[B, H, Qb]`` for all kept blocks together where index and count are given. ``scale`` is times log2(e).
    """
    row = tl.program_id(0)
    blocks = tl.cdiv(tokens, BLOCK)
    query_block, head, item = row % blocks, (row // blocks) % heads, row // (blocks * heads)
    end = tokens
    if lengths is not None:
        end = tl.load(lengths + item)

    place = query_block * BLOCK + tl.arange(0, ROWS) * (BLOCK // ROWS)
    real = place < end
    token = place
    if order is not None:
        token = tl.load(order + item * order_strides[0] + head * order_strides[1] + place, mask=real, other=0)
    queries = scattered(q, q_strides, item, head, token, real, WIDTHS)
    bound = tl.load(lse + (item.to(tl.int64) * heads + head) * tokens + token, mask=real, other=float("inf")) * LOG2E
    bound = tl.where(bound == float("-inf"), float("inf"), bound)  # a query that saw nothing pays nothing
    share = 1 / tl.maximum(tl.sum(real.to(tl.float32), 0), 1)

    live, whole, key_block = blocks, end // BLOCK, 0
    if index is not None:
        kept = index + item * index_strides[0] + head * index_strides[1] + query_block * index_strides[2]
        live = tl.load(count + item * count_strides[0] + head * count_strides[1] + query_block * count_strides[2])
        whole, key_block = before_end(kept, live, end, BLOCK), tl.load(kept)
    keys, key_head, total = (k, k_rest), head // group, 0.0
    for step in range(0, whole):
        following = step + 1
        if index is not None:  # ahead of its use, see `block_sparse_triton`
            following = tl.load(kept + tl.minimum(step + 1, whole - 1))
        paid = received(
            queries, bound, keys, k_strides, item, key_head, key_block, end, scale,
            BLOCK, ROWS, KEYS, WIDTHS, TMA, False,
        )  # fmt: skip
        total += paid
        if index is None:
            tl.store(out + row.to(tl.int64) * blocks + step, paid * share)
        key_block = following
    for step in range(whole, live):
        key_block = step
        if index is not None:
            key_block = tl.load(kept + step)
        paid = received(
            queries, bound, keys, k_strides, item, key_head, key_block, end, scale,
            BLOCK, ROWS, KEYS, WIDTHS, TMA, True,
        )  # fmt: skip
        total += paid
        if index is None:
            tl.store(out + row.to(tl.int64) * blocks + step, paid * share)
    if index is not None:
        tl.store(out + row, total * share)


@triton.jit
def received(
    queries,
    bound,
    k,
    k_strides,
    item,
    head,
    key_block,
    end,
    scale,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTHS: tl.constexpr,
    TMA: tl.constexpr,
    CUT: tl.constexpr,
):
    """What all queries together pay to one block of keys; CUT: those from ``end`` on get nothing. The warps, which each
    hold some queries, meet once a block."""
    weights = tl.zeros([ROWS, KEYS], tl.float32)
    for part in tl.static_range(BLOCK // KEYS):
        start = key_block * BLOCK + part * KEYS
        scores = products(queries, k, k_strides, item, head, start, end, KEYS, WIDTHS, TMA, CUT and not TMA)
        paid = tl.exp2(scores * scale - bound[:, None])
        if CUT:
            paid = tl.where((start + tl.arange(0, KEYS) < end)[None, :], paid, 0.0)
        weights += paid
    return tl.sum(tl.reshape(weights, [ROWS * KEYS]), 0)  # axis by axis Triton fails for sm100
