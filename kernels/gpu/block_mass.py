"""Triton kernel of `planning/block_mass.py`: attention mass from one query block to each key block, in one pass."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import count_full_blocks, dot_rows, gather_rows, load_index_row, load_length, load_tokens, split_program_id

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def block_mass_kernel(
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
    group_size,
    tokens,
    scale,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTHS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Compute the mean mass of ROWS evenly spaced queries of one block.

    Args:
        q, k, k_rest, order, lengths, group_size, scale, BLOCK, KEYS, WIDTHS, TMA: as in `block_sparse_kernel`.
        lse: natural log-sum-exp, float32 ``[B, H, N]``.
        index, count: as in `Plan`, to compute the total mass of the kept blocks; None for the mass of every block.
        out: float32, ``[B, H, Qb]`` with an index, otherwise ``[B, H, Qb, Qb]``.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(tokens, BLOCK)
    query_block, head, item = split_program_id(program, blocks, heads)
    end = load_length(lengths, item, tokens)

    position = query_block * BLOCK + tl.arange(0, ROWS) * (BLOCK // ROWS)
    valid = position < end
    token = load_tokens(order, order_strides, item, head, position, valid)
    queries = gather_rows(q, q_strides, item, head, token, valid, WIDTHS)
    lse_row = lse + (item.to(tl.int64) * heads + head) * tokens
    lse_2 = tl.load(lse_row + token, mask=valid, other=float("inf")) * LOG2E
    lse_2 = tl.where(lse_2 == float("-inf"), float("inf"), lse_2)  # a query without keys has weights of zero
    mean_factor = 1 / tl.maximum(tl.sum(valid.to(tl.float32), 0), 1)

    kept, full, key_block = blocks, end // BLOCK, 0
    if index is not None:
        index_row, kept = load_index_row(index, index_strides, count, count_strides, item, head, query_block)
        full, key_block = count_full_blocks(index_row, kept, end, BLOCK), tl.load(index_row)
    keys, key_head, total = (k, k_rest), head // group_size, 0.0
    for step in range(0, full):
        next_block = step + 1
        if index is not None:  # loaded one step ahead, for the reason given in gpu/block_sparse.py
            next_block = tl.load(index_row + tl.minimum(step + 1, full - 1))
        mass = key_block_mass(
            queries, lse_2, keys, k_strides, item, key_head, key_block, end, scale,
            BLOCK, ROWS, KEYS, WIDTHS, TMA, False,
        )  # fmt: skip
        total += mass
        if index is None:
            tl.store(out + program.to(tl.int64) * blocks + step, mass * mean_factor)
        key_block = next_block
    for step in range(full, kept):
        key_block = step
        if index is not None:
            key_block = tl.load(index_row + step)
        mass = key_block_mass(
            queries, lse_2, keys, k_strides, item, key_head, key_block, end, scale,
            BLOCK, ROWS, KEYS, WIDTHS, TMA, True,
        )  # fmt: skip
        total += mass
        if index is None:
            tl.store(out + program.to(tl.int64) * blocks + step, mass * mean_factor)
    if index is not None:
        tl.store(out + program, total * mean_factor)


@triton.jit
def key_block_mass(
    queries,
    lse_2,
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
    MASKED: tl.constexpr,
):
    """Return the sum of the attention weights from all queries to one key block; with MASKED, keys from ``end`` on have
    a weight of zero. Tiles are added before the sum, so that the warps, which hold different queries, synchronize once
    per block."""
    weights = tl.zeros([ROWS, KEYS], tl.float32)
    for part in tl.static_range(BLOCK // KEYS):
        start = key_block * BLOCK + part * KEYS
        scores = dot_rows(queries, k, k_strides, item, head, start, end, KEYS, WIDTHS, TMA, MASKED and not TMA)
        tile_weights = tl.exp2(scores * scale - lse_2[:, None])
        if MASKED:
            tile_weights = tl.where((start + tl.arange(0, KEYS) < end)[None, :], tile_weights, 0.0)
        weights += tile_weights
    return tl.sum(tl.reshape(weights, [ROWS * KEYS]), 0)  # for sm100, Triton cannot sum over one axis after the other
