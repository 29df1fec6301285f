"""The Triton program behind `selection`: the best of one row, by bisecting for the lowest score that is kept.

Floats order as their bits do, so 32 halvings are exact, and a row of scores stays in registers: no sort.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def select(
    scores,
    weights,
    keep,
    wanted,
    columns,
    rows_alike,
    NEAREST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Which entries of a row are its best until their weights reach what is wanted; see ``selection.best``.

    Pointers: scores float32 ``[R, K]``; weights float32 ``[R / rows_alike, K]``, or None: 1 each; keep int8 ``[R, K]``;
    wanted float32 ``[R]``.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    real = column < columns
    score = tl.load(scores + row * columns + column, mask=real, other=float("-inf"))
    if weights is None:
        weight = tl.where(real, 1.0, 0.0)
    else:
        weight = tl.load(weights + row // rows_alike * columns + column, mask=real, other=0.0)
    counts = weight > 0
    enough = tl.load(wanted + row)

    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0 is 0
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    low = tl.min(tl.where(counts, rank, 0x7FFFFFFF), 0).to(tl.int64)
    high = tl.max(tl.where(counts, rank, -0x80000000), 0).to(tl.int64) + 1
    for _ in range(33):  # low keeps enough, high too little
        middle = low + (high - low) // 2
        fits = tl.sum(tl.where(rank >= middle, weight, 0.0), 0) >= enough
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)
    above, equal = counts & (rank > low), counts & (rank == low)
    weight_above = tl.sum(tl.where(above, weight, 0.0), 0)
    before = weight_above + tl.cumsum(tl.where(equal, weight, 0.0), 0) - weight
    wins = (before + weight / 2 <= enough) | (before <= 0) if NEAREST else before < enough
    kept = above | (equal & wins) | (score == float("inf"))
    tl.store(keep + row * columns + column, kept.to(tl.int8), mask=real)
