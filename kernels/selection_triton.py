"""The Triton program behind `selection`: the kept blocks of one row, by bisecting for the lowest score that is kept.

Floats order as their bits do, so 32 halvings are exact, and a row of scores stays in registers: no sort.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def select(
    scores,
    index,
    count,
    columns,
    wanted,
    BY_MASS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Index, ascending, and count of the blocks that a row of scores keeps.

    Pointers: scores float32 ``[R, Kb]``; index int32 ``[R, Kb]``; count int32 ``[R]``. Kept are the ``wanted`` highest
    scores or, BY_MASS, the fewest whose softmax reaches ``wanted``; of equals those that come first; and all +inf.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    real = column < columns
    score = tl.load(scores + row * columns + column, mask=real, other=float("-inf"))
    forced = score == float("inf")
    if BY_MASS:
        ranked = tl.where(forced, float("-inf"), score)
        highest = tl.maximum(tl.max(ranked, 0), -3e38)  # finite, even if all are forced
        weight = tl.where(ranked > float("-inf"), tl.exp2((ranked - highest) * LOG2E), 0.0)
        wanted *= tl.sum(weight, 0)
        real = real & (weight > 0)
    else:
        ranked = score
        weight = tl.where(real, 1.0, 0.0)

    bits = ranked.to(tl.int32, bitcast=True)
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    low = tl.min(tl.where(real, rank, 0x7FFFFFFF), 0).to(tl.int64)
    high = tl.max(tl.where(real, rank, -0x80000000), 0).to(tl.int64) + 1
    for _ in range(33):  # low keeps enough, high too little
        middle = (low + high) // 2
        enough = tl.sum(tl.where(real & (rank >= middle), weight, 0.0), 0) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    above, equal = real & (rank > low), real & (rank == low)
    lacking = wanted - tl.sum(tl.where(above, weight, 0.0), 0)
    first_equals = tl.cumsum(tl.where(equal, weight, 0.0), 0) - weight < lacking
    keep = (above | (equal & first_equals) | forced).to(tl.int32)

    tl.store(count + row, tl.sum(keep, 0))
    place = tl.cumsum(keep, 0) - 1
    tl.store(index + row * columns + place, column, mask=keep > 0)
