"""The Triton program behind `block_ragged`: some queries of one cluster over the runs of keys that it keeps.

Where whole tiles start is read one step ahead, for the reason given in `block_sparse_triton`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import finish, nothing, scattered, visit


@triton.jit
def forward(
    q,
    k,
    v,
    k_rest,
    v_rest,
    out,
    lse,
    starts,
    whole,
    tails,
    ends,
    clusters,
    places,
    order,
    edges,
    schedule,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    starts_strides,
    whole_strides,
    tails_strides,
    ends_strides,
    clusters_strides,
    places_strides,
    order_strides,
    edges_strides,
    heads,
    group,
    tokens,
    tiles,
    runs,
    scale,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTHS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Attention of up to ROWS queries.

    Pointers: q, k, v and their rests, out and lse as in `block_sparse_triton.forward`, k and v in the order of the key
    clusters; starts, whole, tails, ends, clusters and places as `block_ragged` makes them, ``[B, H, ...]``; order int64
    ``[B, H, N]`` and edges int32 ``[B, H, Cq + 1]`` of the queries; schedule int32 ``[B * H * tiles]``.
    """
    program = tl.load(schedule + tl.program_id(0))
    number, head, item = program % tiles, (program // tiles) % heads, program // (tiles * heads)
    key_head = head // group

    cluster = tl.load(clusters + item * clusters_strides[0] + head * clusters_strides[1] + number)
    first = tl.load(places + item * places_strides[0] + head * places_strides[1] + number)
    stop = tl.load(edges + item * edges_strides[0] + head * edges_strides[1] + cluster + 1)
    place = first + tl.arange(0, ROWS)
    real = place < stop
    token = tl.load(order + item * order_strides[0] + head * order_strides[1] + place, mask=real, other=0)
    queries = scattered(q, q_strides, item, head, token, real, WIDTHS)
    keys, values = (k, k_rest), (v, v_rest)

    row = item.to(tl.int64) * starts_strides[0] + head * starts_strides[1] + cluster * starts_strides[2]
    tail_row = item.to(tl.int64) * tails_strides[0] + head * tails_strides[1] + cluster * tails_strides[2]
    end_row = item.to(tl.int64) * ends_strides[0] + head * ends_strides[1] + cluster * ends_strides[2]
    busy = (first < stop).to(tl.int32)  # else a spare program
    steps = busy * tl.load(whole + item * whole_strides[0] + head * whole_strides[1] + cluster * whole_strides[2])

    top, total, sums = nothing(ROWS, WIDTHS)
    start = tl.load(starts + row)
    for step in range(0, steps):
        following = tl.load(starts + row + tl.minimum(step + 1, steps - 1))
        top, total, sums = visit(
            queries, keys, values, k_strides, v_strides, item, key_head, start, tokens, scale, top, total, sums,
            KEYS, WIDTHS, TMA, False,
        )  # fmt: skip
        start = following
    for run in range(0, busy * runs):
        start, end = tl.load(tails + tail_row + run), tl.load(ends + end_row + run)
        if start < end:
            top, total, sums = visit(
                queries, keys, values, k_strides, v_strides, item, key_head, start, end, scale, top, total, sums,
                KEYS, WIDTHS, TMA, True,
            )  # fmt: skip
    token = tl.load(order + item * order_strides[0] + head * order_strides[1] + place, mask=real, other=0)
    finish(out, lse, out_strides, item, head, heads, tokens, token, real, top, total, sums, WIDTHS)
