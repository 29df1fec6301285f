"""Triton kernel of the `block_ragged` executor: attention of queries of one cluster over the runs of keys it keeps.

The start of the next full tile is loaded one step ahead, for the reason given in `gpu/block_sparse.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    gather_rows,
    init_softmax,
    load_tokens,
    split_program_id,
    store_output,
    update_softmax,
    update_softmax_by_tail,
)


@triton.jit
def block_ragged_kernel(
    q,
    k,
    v,
    k_rest,
    v_rest,
    out,
    lse,
    tile_starts,
    tile_counts,
    tail_starts,
    run_ends,
    query_clusters,
    query_starts,
    order,
    edges,
    schedule,
    tail_k,
    tail_v,
    tail_log_sizes,
    tail_groups,
    tail_kept,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    tile_starts_strides,
    tile_counts_strides,
    tail_starts_strides,
    run_ends_strides,
    query_clusters_strides,
    query_starts_strides,
    order_strides,
    edges_strides,
    tail_k_strides,
    tail_v_strides,
    tail_log_sizes_strides,
    tail_groups_strides,
    tail_kept_strides,
    heads,
    group_size,
    tokens,
    tiles,
    runs,
    tail_group_size,
    tail_terms,
    scale,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTHS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Compute attention of up to ROWS queries.

    Args:
        q, k, v, k_rest, v_rest, out, lse, group_size, scale, KEYS, WIDTHS, TMA: as in `block_sparse_kernel`; k and v in
            the order of the key clusters.
        tile_starts, tile_counts, tail_starts: as returned by `block_ragged.key_tiles`, ``[B, H, ...]``.
        run_ends: as returned by `block_ragged.key_runs`.
        query_clusters, query_starts: as returned by `block_ragged.query_tiles`.
        order, edges: of the query clusters, int64 ``[B, H, N]`` and int32 ``[B, H, Cq + 1]``.
        tail_k, tail_v, tail_log_sizes, tail_groups, tail_kept, tail_group_size, tail_terms: as for
            `update_softmax_by_tail`; None and 0 for a plan without a tail.
        schedule: int32 ``[B * H * tiles]``, the query tile that each program computes.
        tiles, runs: query tiles of a head, and runs of a query cluster.
    """
    program = tl.load(schedule + tl.program_id(0))
    number, head, item = split_program_id(program, tiles, heads)
    key_head = head // group_size

    cluster = tl.load(query_clusters + item * query_clusters_strides[0] + head * query_clusters_strides[1] + number)
    first = tl.load(query_starts + item * query_starts_strides[0] + head * query_starts_strides[1] + number)
    stop = tl.load(edges + item * edges_strides[0] + head * edges_strides[1] + cluster + 1)
    position = first + tl.arange(0, ROWS)
    valid = position < stop
    token = load_tokens(order, order_strides, item, head, position, valid)
    queries = gather_rows(q, q_strides, item, head, token, valid, WIDTHS)
    keys, values = (k, k_rest), (v, v_rest)

    start_row = cluster_row(tile_starts, tile_starts_strides, item, head, cluster)
    tail_row = cluster_row(tail_starts, tail_starts_strides, item, head, cluster)
    end_row = cluster_row(run_ends, run_ends_strides, item, head, cluster)
    has_queries = (first < stop).to(tl.int32)
    steps = has_queries * tl.load(
        tile_counts + item * tile_counts_strides[0] + head * tile_counts_strides[1] + cluster * tile_counts_strides[2]
    )

    row_max, row_sum, acc = init_softmax(ROWS, WIDTHS)
    start = tl.load(start_row)
    for step in range(0, steps):
        next_start = tl.load(start_row + tl.minimum(step + 1, steps - 1))
        row_max, row_sum, acc = update_softmax(
            queries, keys, values, k_strides, v_strides, item, key_head, start, tokens, scale, row_max, row_sum, acc,
            KEYS, WIDTHS, TMA, False,
        )  # fmt: skip
        start = next_start
    for run in range(0, has_queries * runs):
        start, end = tl.load(tail_row + run), tl.load(end_row + run)
        if start < end:
            row_max, row_sum, acc = update_softmax(
                queries, keys, values, k_strides, v_strides, item, key_head, start, end, scale, row_max, row_sum, acc,
                KEYS, WIDTHS, TMA, True,
            )  # fmt: skip
    if tail_k is not None:
        row_max, row_sum, acc = update_softmax_by_tail(
            queries, tail_k, tail_v, tail_log_sizes, tail_groups, tail_kept, tail_k_strides, tail_v_strides,
            tail_log_sizes_strides, tail_groups_strides, tail_kept_strides, item, head, cluster, tail_group_size,
            has_queries * tail_terms, scale, row_max, row_sum, acc, KEYS, WIDTHS,
        )  # fmt: skip
    store_output(out, lse, out_strides, item, head, heads, tokens, token, valid, row_max, row_sum, acc, WIDTHS)


@triton.jit
def cluster_row(x, strides, item, head, cluster):
    """Return the pointer to the row of a query cluster in ``x [B, H, Cq, ...]``."""
    return x + (item.to(tl.int64) * strides[0] + head * strides[1] + cluster * strides[2])
