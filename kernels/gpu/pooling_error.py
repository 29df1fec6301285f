"""Triton kernels of `planning/pooling_error.py`: the error of pooled terms, for every query block and key tile.

Both take two passes over the terms or keys: the first computes the log-sum-exp of every query, the second the scores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import dot_rows, gather_rows, split_program_id


@triton.jit
def update_log_sum(logits, row_max, row_sum):
    """Add logits in base 2 to the maximum and the sum of exponentials of every row."""
    new_max = tl.maximum(row_max, tl.max(logits, 1))
    row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(tl.exp2(logits - new_max[:, None]), 1)
    return new_max, row_sum


@triton.jit
def term_logits(
    queries, means, log_sizes, strides, item, head, start, terms, scale, KEYS: tl.constexpr, WIDTHS: tl.constexpr
):
    """Return the base-2 logits of KEYS pooled terms from ``start``; -inf for those from ``terms`` on."""
    scores = dot_rows(queries, (means, means), strides, item, head, start, terms, KEYS, WIDTHS, False, True)
    term = start + tl.arange(0, KEYS)
    return scores * scale + tl.load(log_sizes + term, mask=term < terms, other=float("-inf"))[None, :]


@triton.jit
def mass_and_spread_kernel(
    q,
    means,
    variances,
    log_sizes,
    out,
    q_strides,
    means_strides,
    heads,
    group_size,
    tokens,
    terms,
    scale,
    square_scale,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTHS: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """Compute the mean softmax over pooled terms of the queries of one block, with SPREAD times the variance of logits.

    Args:
        q: ``[B, H, N, D]``.
        means, variances: of the keys of every tile, ``[B, Hkv, T, D]`` with the same strides.
        log_sizes: base-2 logarithm of the tokens of each tile, float32 ``[T]``.
        out: float32 ``[B, H, Qb, T]``.
        group_size: H / Hkv.
        terms: T.
        scale: from scores to base-2 logits.
        square_scale: factor of the squares of the queries.
        BLOCK, KEYS, WIDTHS: as in `block_sparse_kernel`.
    """
    program = tl.program_id(0)
    query_block, head, item = split_program_id(program, tl.cdiv(tokens, BLOCK), heads)
    key_head = head // group_size
    position = query_block * BLOCK + tl.arange(0, BLOCK)
    valid = position < tokens
    queries = gather_rows(q, q_strides, item, head, position, valid, WIDTHS)

    row_max = tl.full([BLOCK], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, terms, KEYS):
        logits = term_logits(
            queries, means, log_sizes, means_strides, item, key_head, start, terms, scale, KEYS, WIDTHS
        )
        row_max, row_sum = update_log_sum(logits, row_max, row_sum)
    factor = tl.where(valid, 1 / (row_sum * tl.sum(valid.to(tl.float32), 0)), 0.0)

    squares = ()
    for i in tl.static_range(len(WIDTHS)):
        columns = queries[i].to(tl.float32)
        squares = squares + ((columns * columns * square_scale).to(queries[i].dtype),)
    for start in range(0, terms, KEYS):
        logits = term_logits(
            queries, means, log_sizes, means_strides, item, key_head, start, terms, scale, KEYS, WIDTHS
        )
        weights = tl.exp2(logits - row_max[:, None]) * factor[:, None]
        if SPREAD:
            weights *= dot_rows(
                squares, (variances, variances), means_strides, item, key_head, start, terms, KEYS, WIDTHS, False, True
            )
        term = start + tl.arange(0, KEYS)
        tl.store(out + program.to(tl.int64) * terms + term, tl.sum(weights, 0), mask=term < terms)


@triton.jit
def pooling_error_kernel(
    q,
    k,
    sampled,
    out,
    q_strides,
    k_strides,
    heads,
    group_size,
    tokens,
    block,
    samples,
    tiles,
    scale,
    BLOCKS: tl.constexpr,
    SAMPLES: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTHS: tl.constexpr,
):
    """Compute, for the sampled queries of BLOCKS blocks, the mean distance of the exact weights of each tile from the
    weight of its mean key, whose logit is the mean of the logits of its keys.

    Args:
        q, k: ``[B, H, N, D]`` and ``[B, Hkv, N, D]``.
        sampled: positions in a block, int32 ``[samples]``; a position after the last token is the last token.
        out: float32 ``[B, H, Qb, T]``.
        block: tokens of a query block.
        tiles: T.
        SAMPLES: power of 2 from ``samples`` on.
        COLUMNS: tokens of a key tile; divides KEYS.
        group_size, scale, KEYS, WIDTHS: as in `mass_and_spread_kernel`.
    """
    blocks = tl.cdiv(tokens, block)
    group, head, item = split_program_id(tl.program_id(0), tl.cdiv(blocks, BLOCKS), heads)
    key_head = head // group_size
    ROWS: tl.constexpr = BLOCKS * SAMPLES
    row = tl.arange(0, ROWS)
    valid = (row % SAMPLES < samples) & (group * BLOCKS + row // SAMPLES < blocks)
    position = tl.load(sampled + row % SAMPLES, mask=valid, other=0) + (group * BLOCKS + row // SAMPLES) * block
    queries = gather_rows(q, q_strides, item, head, tl.minimum(position, tokens - 1), valid, WIDTHS)
    keys = (k, k)

    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    for start in range(0, tokens, KEYS):
        scores = dot_rows(queries, keys, k_strides, item, key_head, start, tokens, KEYS, WIDTHS, False, True)
        is_key = (start + tl.arange(0, KEYS) < tokens)[None, :]
        row_max, row_sum = update_log_sum(tl.where(is_key, scores * scale, float("-inf")), row_max, row_sum)
    lse = (row_max + tl.log2(row_sum))[:, None]

    TILES: tl.constexpr = KEYS // COLUMNS
    own_block = (group * BLOCKS + tl.arange(0, BLOCKS))[:, None]
    out_rows = out + ((item.to(tl.int64) * heads + head) * blocks + own_block) * tiles
    for start in range(0, tokens, KEYS):
        scores = dot_rows(queries, keys, k_strides, item, key_head, start, tokens, KEYS, WIDTHS, False, True) * scale
        key = start + tl.arange(0, KEYS)
        weights = tl.where((key < tokens)[None, :], tl.exp2(scores - lse), 0.0)
        size = tl.minimum(tl.maximum(tokens - start - tl.arange(0, TILES) * COLUMNS, 1), COLUMNS)[None, :]
        # Keys from ``tokens`` on have zero scores and weights: their part of the squares is removed in closed form.
        mean = tl.sum(tl.reshape(scores, [ROWS, TILES, COLUMNS]), 2) / size
        pooled = tl.exp2(mean - lse)
        difference = tl.reshape(weights, [ROWS, TILES, COLUMNS]) - pooled[:, :, None]
        square = tl.sum(difference * difference, 2) - (COLUMNS - size) * pooled * pooled
        distance = tl.where(valid[:, None], tl.sqrt(tl.maximum(square, 0.0)), 0.0)
        means = tl.sum(tl.reshape(distance, [BLOCKS, SAMPLES, TILES]), 1) / samples
        tile = (start // COLUMNS + tl.arange(0, TILES))[None, :]
        tl.store(out_rows + tile, means, mask=(own_block < blocks) & (tile < tiles))
