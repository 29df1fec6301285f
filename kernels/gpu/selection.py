"""Triton kernel of `planning/selection.py`: the top scores of one row, by bisection for the lowest score to keep.

The bits of float32 numbers, read as integers, have the same order as the numbers, so 33 bisections are exact. A row of
scores stays in registers and is not sorted.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def select_top_kernel(
    scores,
    weights,
    keep,
    target,
    columns,
    rows_per_weight,
    TO_NEAREST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Keep the top entries of one row until the sum of their weights reaches its target; see `selection.select_top`.

    Args:
        scores: float32 ``[R, K]``.
        weights: float32 ``[R / rows_per_weight, K]``; None: 1 for every score.
        keep: int8 ``[R, K]``.
        target: float32 ``[R]``.
        columns: K; at most WIDTH.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    valid = column < columns
    score = tl.load(scores + row * columns + column, mask=valid, other=float("-inf"))
    if weights is None:
        weight = tl.where(valid, 1.0, 0.0)
    else:
        weight = tl.load(weights + row // rows_per_weight * columns + column, mask=valid, other=0.0)
    has_weight = weight > 0
    row_target = tl.load(target + row)

    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # replaces -0 by 0, whose bits differ
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    low = tl.min(tl.where(has_weight, rank, 0x7FFFFFFF), 0).to(tl.int64)
    high = tl.max(tl.where(has_weight, rank, -0x80000000), 0).to(tl.int64) + 1
    for _ in range(33):  # ranks from low on reach the target, ranks from high on do not
        middle = low + (high - low) // 2
        reached = tl.sum(tl.where(rank >= middle, weight, 0.0), 0) >= row_target
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    above, equal = has_weight & (rank > low), has_weight & (rank == low)
    weight_above = tl.sum(tl.where(above, weight, 0.0), 0)
    before = weight_above + tl.cumsum(tl.where(equal, weight, 0.0), 0) - weight
    fits = (before + weight / 2 <= row_target) | (before <= 0) if TO_NEAREST else before < row_target
    kept = above | (equal & fits) | (score == float("inf"))
    tl.store(keep + row * columns + column, kept.to(tl.int8), mask=valid)
