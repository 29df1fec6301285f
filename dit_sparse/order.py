"""Token orders: which tokens share a block. Each function gives ``order [N]``: place i holds token ``order[i]``.

Text keeps its place at the front or the end of the sequence, so padding stays a tail.
"""

from __future__ import annotations

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
    AIP 2004): neighbours on the curve are neighbours in the video, for any block size and any grid."""
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


def inverse(order: Tensor) -> Tensor:
    """The order that undoes ``order``."""
    return order.argsort(-1)


def _video(grid: Grid) -> tuple[Tensor, ...]:
    inside = slice(grid.before, grid.before + grid.video)
    return tuple(axis[inside] for axis in grid.coordinates())


def _with_text(grid: Grid, place: Tensor) -> Tensor:
    """The order that sorts the video tokens by ``place [video]`` and leaves the text where it is."""
    end = grid.before + grid.video
    return torch.cat(
        [torch.arange(grid.before), place.argsort(stable=True) + grid.before, torch.arange(end, grid.tokens)]
    )
