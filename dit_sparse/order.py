"""Token orders: which tokens share a block. Each function gives ``order [N]``: place i holds token ``order[i]``.

Text keeps its place at the front or the end of the sequence, so padding stays a tail.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from .grid import Grid


def row_major(grid: Grid) -> Tensor:
    """Frame by frame, row by row: how the models give their tokens."""
    return torch.arange(grid.tokens)


def frame_last(grid: Grid) -> Tensor:
    """Position by position: the same place of every frame side by side (SVG's temporal heads, arXiv:2502.01776)."""
    frame, row, column, _ = _video(grid)
    return _with_text(grid, (row * grid.width + column) * grid.frames + frame)


def tiles(grid: Grid, frames: int, height: int, width: int) -> Tensor:
    """Box by box of ``frames x height x width`` tokens; boxes at the far edges hold what is left."""
    frame, row, column, _ = _video(grid)
    rows, columns = -(-grid.height // height), -(-grid.width // width)
    box = (frame // frames * rows + row // height) * columns + column // width
    inside = (frame % frames * height + row % height) * width + column % width
    return _with_text(grid, box * (frames * height * width) + inside)


def hilbert(grid: Grid) -> Tensor:
    """Along the 3-D Hilbert curve of the enclosing power-of-two cube (J. Skilling, "Programming the Hilbert curve",
    AIP 2004), without the places outside the video: neighbours on the curve are neighbours in the video, for any block
    size and any grid. Where the curve leaves the video it jumps; blocks of 64 are whole cubes all the same, and more
    compact than those of `gilbert`."""
    axes = list(_video(grid)[:3])
    bits = max(1, (max(grid.frames, grid.height, grid.width) - 1).bit_length())
    level = 1 << (bits - 1)
    while level > 1:
        below = level - 1
        for i in range(3):
            flip = (axes[i] & level) != 0
            swap = torch.where(flip, 0, (axes[0] ^ axes[i]) & below)
            axes[0] = torch.where(flip, axes[0] ^ below, axes[0]) ^ swap
            axes[i] = axes[i] ^ swap if i else axes[0]
        level >>= 1
    axes[1] = axes[1] ^ axes[0]
    axes[2] = axes[2] ^ axes[1]
    parity = torch.zeros_like(axes[0])
    for bit in range(bits - 1, 0, -1):
        parity = torch.where((axes[2] >> bit) & 1 == 1, parity ^ ((1 << bit) - 1), parity)
    place = torch.zeros_like(parity)
    for bit in range(bits - 1, -1, -1):
        for axis in axes:
            place = place << 1 | ((axis ^ parity) >> bit & 1)
    return _with_text(grid, place)


@lru_cache(maxsize=8)
def gilbert(grid: Grid) -> Tensor:
    """Along the generalised Hilbert curve of J. Cerveny ("gilbert"), which fills a box of any size without leaving it:
    every step goes to a cell that touches the last, at odd sides now and then across an edge. Blocks of 128 are more
    compact than those of `hilbert`. Found once a grid, in seconds for 100,000 tokens."""
    extents = sorted(enumerate((grid.frames, grid.height, grid.width)), key=lambda axis: -axis[1])
    frame, row, column = torch.tensor(list(_gilbert((0, 0, 0), *extents))).T
    place = torch.empty_like(frame)
    place[(frame * grid.height + row) * grid.width + column] = torch.arange(grid.video)
    return _with_text(grid, place)


Cell = tuple[int, int, int]
Axis = tuple[int, int]  # a dimension and a signed length


def _gilbert(start: Cell, a: Axis, b: Axis, c: Axis) -> Iterator[Cell]:
    """The cells of the box from ``start`` along three axes, in an order that ends at the far end of ``a``."""
    lengths = [abs(length) for _, length in (a, b, c)]
    longest = max(lengths)
    if math.prod(lengths) == longest:
        line = (a, b, c)[lengths.index(longest)]
        yield from (_moved(start, _steps(line, step)) for step in range(longest))
        return
    if 3 * lengths[2] > 4 * lengths[1]:
        b, c = c, b
    (a1, a2), (b1, b2), (c1, c2) = map(_halves, (a, b, c))
    if 2 * lengths[0] > 3 * max(lengths[1:]):
        yield from _gilbert(start, a1, b, c)
        yield from _gilbert(_moved(start, a1), a2, b, c)
    elif 3 * max(lengths[1:]) > 4 * min(lengths[1:]):
        yield from _gilbert(start, b1, c, a1)
        yield from _gilbert(_moved(start, b1), a, b2, c)
        yield from _gilbert(_moved(start, _last(a), _last(b1)), _back(b1), c, _back(a2))
    else:
        yield from _gilbert(start, b1, c1, a1)
        yield from _gilbert(_moved(start, b1), c, a1, b2)
        yield from _gilbert(_moved(start, _last(b1), _last(c)), a, _back(b1), _back(c2))
        yield from _gilbert(_moved(start, _last(a), b1, _last(c)), _back(c), _back(a2), b2)
        yield from _gilbert(_moved(start, _last(a), _last(b1)), _back(b1), c1, _back(a2))


def _halves(axis: Axis) -> tuple[Axis, Axis]:
    """Two parts of an axis, the first even where it can be: a curve through an odd side cannot avoid a slanted step."""
    length = abs(axis[1])
    half = length // 2
    first = _steps(axis, half + half % 2 if length > 2 else half)
    return first, (axis[0], axis[1] - first[1])


def _steps(axis: Axis, count: int) -> Axis:
    return axis[0], count if axis[1] > 0 else -count


def _last(axis: Axis) -> Axis:
    return _steps(axis, abs(axis[1]) - 1)


def _back(axis: Axis) -> Axis:
    return axis[0], -axis[1]


def _moved(place: Cell, *axes: Axis) -> Cell:
    moved = list(place)
    for dimension, length in axes:
        moved[dimension] += length
    return tuple(moved)


def _video(grid: Grid) -> tuple[Tensor, ...]:
    inside = slice(grid.before, grid.before + grid.video)
    return tuple(axis[inside] for axis in grid.coordinates())


def _with_text(grid: Grid, place: Tensor) -> Tensor:
    """The order that sorts the video tokens by ``place [video]`` and leaves the text where it is."""
    end = grid.before + grid.video
    return torch.cat(
        [torch.arange(grid.before), place.argsort(stable=True) + grid.before, torch.arange(end, grid.tokens)]
    )
