"""Triton kernel of the `block_sparse` executor: attention of one query block over its list of key blocks.

FlashAttention-2 (T. Dao, arXiv:2307.08691) over a list of key blocks instead of a range. The list ascends, so at most
one of its blocks extends past the end of the sequence or into padding, and that block is the last: the main loop over
full blocks needs no mask, and the masked loop runs for at most one block.

The number of the next key block is loaded one step ahead. Loaded in the step that uses it, it would occupy a stage of
Triton's pipeline and leave a single buffer for keys and values, so that no load would overlap with computation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    count_full_blocks,
    gather_rows,
    init_softmax,
    load_index_row,
    load_length,
    load_tokens,
    split_program_id,
    store_output,
    update_softmax,
    update_softmax_by_tail,
)


@triton.jit
def block_sparse_kernel(
    q,
    k,
    v,
    k_rest,
    v_rest,
    out,
    lse,
    index,
    count,
    order,
    lengths,
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
    index_strides,
    count_strides,
    order_strides,
    tail_k_strides,
    tail_v_strides,
    tail_log_sizes_strides,
    tail_groups_strides,
    tail_kept_strides,
    heads,
    group_size,
    tokens,
    tail_group_size,
    tail_terms,
    scale,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTHS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Compute attention of one query block.

    Args:
        q, out: ``[B, H, N, D]``.
        k, v: ``[B, Hkv, N, D]`` in the plan's order; with TMA, descriptors of tiles ``[1, 1, KEYS, WIDTHS[0]]``.
        k_rest, v_rest: as k and v; with TMA and more than one width, descriptors of tiles of ``WIDTHS[1]`` columns.
        lse: float32 ``[B, H, N]``.
        index, count: as in `Plan`.
        order, lengths: as in `Plan`; may be None.
        schedule: int32 ``[B * H * Qb]``, the query block that each program computes.
        tail_k, tail_v, tail_log_sizes, tail_groups, tail_kept, tail_group_size, tail_terms: as for
            `update_softmax_by_tail`; None and 0 for a plan without a tail.
        group_size: H / Hkv.
        scale: factor from scores to base-2 logarithms.
        BLOCK: tokens in a block.
        KEYS: keys of one step; divides BLOCK.
        WIDTHS: columns of the tiles of a row; their sum is D.
    """
    program = tl.load(schedule + tl.program_id(0))
    query_block, head, item = split_program_id(program, tl.cdiv(tokens, BLOCK), heads)
    key_head = head // group_size

    position = query_block * BLOCK + tl.arange(0, BLOCK)
    valid = position < tokens
    token = load_tokens(order, order_strides, item, head, position, valid)
    queries = gather_rows(q, q_strides, item, head, token, valid, WIDTHS)
    keys, values = (k, k_rest), (v, v_rest)

    end = load_length(lengths, item, tokens)
    index_row, kept = load_index_row(index, index_strides, count, count_strides, item, head, query_block)
    full = count_full_blocks(index_row, kept, end, BLOCK)

    row_max, row_sum, acc = init_softmax(BLOCK, WIDTHS)
    TILES: tl.constexpr = BLOCK // KEYS
    steps = full * TILES
    start = tl.load(index_row) * BLOCK
    for step in range(0, steps):
        next_step = tl.minimum(step + 1, steps - 1)
        next_start = tl.load(index_row + next_step // TILES) * BLOCK + next_step % TILES * KEYS
        row_max, row_sum, acc = update_softmax(
            queries, keys, values, k_strides, v_strides, item, key_head, start, end, scale, row_max, row_sum, acc,
            KEYS, WIDTHS, TMA, False,
        )  # fmt: skip
        start = next_start
    if full < kept:
        first = tl.load(index_row + full) * BLOCK
        for start in range(first, tl.minimum(first + BLOCK, end), KEYS):
            row_max, row_sum, acc = update_softmax(
                queries, keys, values, k_strides, v_strides, item, key_head, start, end, scale, row_max, row_sum, acc,
                KEYS, WIDTHS, TMA, True,
            )  # fmt: skip

    if tail_k is not None:
        row_max, row_sum, acc = update_softmax_by_tail(
            queries, tail_k, tail_v, tail_log_sizes, tail_groups, tail_kept, tail_k_strides, tail_v_strides,
            tail_log_sizes_strides, tail_groups_strides, tail_kept_strides, item, head, query_block, tail_group_size,
            tail_terms, scale, row_max, row_sum, acc, KEYS, WIDTHS,
        )  # fmt: skip
    store_output(out, lse, out_strides, item, head, heads, tokens, token, valid, row_max, row_sum, acc, WIDTHS)
