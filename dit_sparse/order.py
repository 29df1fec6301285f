"""Token orders, from which blocks are cut: ``order [N]``, where position i holds token ``order[i]``.

Only video tokens are reordered. Text stays at the front and the end of the sequence, so padding stays at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .grid import BaseGrid, Grid

Cell = tuple[int, int, int]
Axis = tuple[int, int]  # a dimension and a signed length


def row_major(grid: BaseGrid) -> Tensor:
    """Frame by frame, row by row: the order of the models."""
    return torch.arange(grid.tokens)


def frame_last(grid: Grid) -> Tensor:
    """Position by position: the same position of all frames next to each other, as for SVG's temporal heads
    (arXiv:2502.01776)."""
    frame, row, column = _video_coordinates(grid)
    return _sort_video(grid, (row * grid.width + column) * grid.frames + frame)


def tiles(grid: Grid, frames: int, height: int, width: int) -> Tensor:
    """Tile by tile of ``frames x height x width`` tokens; tiles at the far edges hold fewer."""
    frame, row, column = _video_coordinates(grid)
    rows, columns = -(-grid.height // height), -(-grid.width // width)
    tile = (frame // frames * rows + row // height) * columns + column // width
    within = (frame % frames * height + row % height) * width + column % width
    return _sort_video(grid, tile * (frames * height * width) + within)


BOXES = ((4, 4, 4), (2, 4, 4), (2, 2, 4))  # frames, height, width; each box is filled by the next smaller ones


def nested_boxes(grid: BaseGrid, boxes: Sequence[Cell] = BOXES) -> Tensor:
    """Box by box of 4x4x4 tokens, in each box half by half (2x4x4), in each half quarter by quarter (2x2x4).

    Blocks of 64, 32 and 16 tokens are therefore compact. Complete boxes come first, and boxes that exceed the video
    last, so that these do not shift the blocks of the others.

    Args:
        boxes: sides of the boxes, the largest first; each divides the one before it.
    """
    cell, sides = _video_coordinates(grid), grid.sides
    whole = [side // length * length for side, length in zip(sides, boxes[0], strict=True)]
    position = torch.zeros_like(cell[0])
    for axis, end in zip(cell, whole, strict=True):
        position = position * 2 + (axis >= end)
    for box in boxes:
        for axis, side, length in zip(cell, sides, box, strict=True):
            position = position * -(-side // length) + axis // length
    return _sort_video(grid, position)


def hilbert(grid: BaseGrid) -> Tensor:
    """Along the Hilbert curve of the smallest cube with power-of-two sides that holds the video.

    Cells outside the video are skipped, so the curve may jump there. Blocks of 64 are nevertheless whole cubes, and
    more compact than those of :func:`gilbert`.
    """
    bits = max(1, (max(grid.sides) - 1).bit_length())
    return _sort_video(grid, hilbert_index(_video_coordinates(grid), bits))


def morton(grid: BaseGrid) -> Tensor:
    """Along the Morton curve (Z-order): the tokens of every aligned cube with sides ``2 ** n`` are consecutive."""
    bits = max(1, (max(grid.sides) - 1).bit_length())
    return _sort_video(grid, morton_index(_video_coordinates(grid), bits))


@lru_cache(maxsize=8)
def gilbert(grid: BaseGrid) -> Tensor:
    """Along the generalized Hilbert curve, which covers a video of any size and no cells outside of it.

    Blocks of 128 are more compact than those of :func:`hilbert`. Cached, because it takes seconds for 100,000 tokens.
    Voxels fill a small part of their box, so they follow :func:`hilbert`.
    """
    if not isinstance(grid, Grid):
        return hilbert(grid)
    cells = generalized_hilbert((grid.frames, grid.height, grid.width))
    frame, row, column = torch.tensor(list(cells)).T
    position = torch.empty_like(frame)
    position[(frame * grid.height + row) * grid.width + column] = torch.arange(grid.video)
    return _sort_video(grid, position)


def reorder(x: Tensor, order: Tensor | None) -> Tensor:
    """Return ``x [B, H, N, ...]`` in an order ``[N]`` or ``[B|1, H|1, N]``.

    If the order has more heads than x, the heads of x are repeated (grouped queries).
    """
    if order is None:
        return x
    if order.ndim == 1:
        return x.index_select(2, order)
    if x.shape[1] < order.shape[1]:
        x = x.repeat_interleave(order.shape[1] // x.shape[1], 1)
    order = order.expand(*x.shape[:2], -1)
    if x.ndim == 3:
        return x.gather(2, order)
    # Whole rows are copied: gather would read an index for every element.
    first = torch.arange(x.shape[0] * x.shape[1], device=x.device).view(*x.shape[:2], 1) * x.shape[2]
    return x.flatten(0, 2).index_select(0, (order + first).flatten()).view(*order.shape, *x.shape[3:])


def _video_coordinates(grid: BaseGrid) -> tuple[Tensor, Tensor, Tensor]:
    frame, row, column, text = grid.coordinates()
    return frame[~text], row[~text], column[~text]


def _sort_video(grid: BaseGrid, position: Tensor) -> Tensor:
    """Return the order that sorts the video tokens by ``position [video]`` and leaves the text in place."""
    order = torch.arange(grid.tokens)
    order[grid.before : grid.before + grid.video] = position.argsort(stable=True) + grid.before
    return order


def hilbert_index(cells: Sequence[Tensor], bits: int) -> Tensor:
    """Return the position of cells on the 3-D Hilbert curve of a cube with sides ``2 ** bits``.

    Algorithm of J. Skilling, "Programming the Hilbert curve", AIP 2004.

    Args:
        cells: three int64 tensors of coordinates, ``[N]`` each.
    """
    axes = list(cells)
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
    index = torch.zeros_like(parity)
    for bit in range(bits - 1, -1, -1):
        for axis in axes:
            index = index << 1 | ((axis ^ parity) >> bit & 1)
    return index


def morton_index(cells: Sequence[Tensor], bits: int) -> Tensor:
    """Return the position of cells on the 3-D Morton curve: the bits of their coordinates, interleaved.

    Args:
        cells: three int64 tensors of coordinates from 0 to ``2 ** bits - 1``, ``[N]`` each.
    """
    index = torch.zeros_like(cells[0])
    for bit in range(bits - 1, -1, -1):
        for cell in cells:
            index = index << 1 | (cell >> bit & 1)
    return index


def generalized_hilbert(sides: Cell) -> Iterator[Cell]:
    """Yield the cells of a box of any size along the generalized Hilbert curve ("gilbert") of J. Cerveny.

    Consecutive cells share a face; odd sides also need a few diagonal steps.
    """
    return _fill_box((0, 0, 0), *sorted(enumerate(sides), key=lambda axis: -axis[1]))


def _fill_box(start: Cell, a: Axis, b: Axis, c: Axis) -> Iterator[Cell]:
    """Yield the cells of the box that ``start`` and three axes span, ending at the far end of ``a``."""
    lengths = [abs(length) for _, length in (a, b, c)]
    longest = max(lengths)
    if math.prod(lengths) == longest:
        line = (a, b, c)[lengths.index(longest)]
        yield from (_move(start, _resize(line, step)) for step in range(longest))
        return
    if 3 * lengths[2] > 4 * lengths[1]:
        b, c = c, b
    (a1, a2), (b1, b2), (c1, c2) = map(_halve, (a, b, c))
    if 2 * lengths[0] > 3 * max(lengths[1:]):
        yield from _fill_box(start, a1, b, c)
        yield from _fill_box(_move(start, a1), a2, b, c)
    elif 3 * max(lengths[1:]) > 4 * min(lengths[1:]):
        yield from _fill_box(start, b1, c, a1)
        yield from _fill_box(_move(start, b1), a, b2, c)
        yield from _fill_box(_move(start, _to_end(a), _to_end(b1)), _reverse(b1), c, _reverse(a2))
    else:
        yield from _fill_box(start, b1, c1, a1)
        yield from _fill_box(_move(start, b1), c, a1, b2)
        yield from _fill_box(_move(start, _to_end(b1), _to_end(c)), a, _reverse(b1), _reverse(c2))
        yield from _fill_box(_move(start, _to_end(a), b1, _to_end(c)), _reverse(c), _reverse(a2), b2)
        yield from _fill_box(_move(start, _to_end(a), _to_end(b1)), _reverse(b1), c1, _reverse(a2))


def _halve(axis: Axis) -> tuple[Axis, Axis]:
    """Cut an axis in two, the first part even if possible: an odd side forces a diagonal step."""
    length = abs(axis[1])
    half = length // 2
    first = _resize(axis, half + half % 2 if length > 2 else half)
    return first, (axis[0], axis[1] - first[1])


def _resize(axis: Axis, length: int) -> Axis:
    return axis[0], length if axis[1] > 0 else -length


def _to_end(axis: Axis) -> Axis:
    return _resize(axis, abs(axis[1]) - 1)


def _reverse(axis: Axis) -> Axis:
    return axis[0], -axis[1]


def _move(cell: Cell, *axes: Axis) -> Cell:
    target = list(cell)
    for dimension, length in axes:
        target[dimension] += length
    return tuple(target)
