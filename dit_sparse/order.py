"""Token orders, from which blocks are cut. Each function returns ``order [N]``: position i holds token ``order[i]``.

Only video tokens are reordered. Text stays at the front and the end of the sequence, so padding stays at the end.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .curves import generalized_hilbert, hilbert_index
from .grid import Grid


def row_major(grid: Grid) -> Tensor:
    """Frame by frame, row by row: the order of the models."""
    return torch.arange(grid.tokens)


def frame_last(grid: Grid) -> Tensor:
    """Place by place: the same place of all frames side by side, as for SVG's temporal heads (arXiv:2502.01776)."""
    frame, row, column = _video_coordinates(grid)
    return _sort_video(grid, (row * grid.width + column) * grid.frames + frame)


def tiles(grid: Grid, frames: int, height: int, width: int) -> Tensor:
    """Tile by tile of ``frames x height x width`` tokens; tiles at the far edges hold fewer."""
    frame, row, column = _video_coordinates(grid)
    rows, columns = -(-grid.height // height), -(-grid.width // width)
    tile = (frame // frames * rows + row // height) * columns + column // width
    within = (frame % frames * height + row % height) * width + column % width
    return _sort_video(grid, tile * (frames * height * width) + within)


def hilbert(grid: Grid) -> Tensor:
    """Along the Hilbert curve of the smallest cube with power-of-two sides that holds the video.

    Cells outside the video are skipped, so the curve may jump there. Blocks of 64 are nevertheless whole cubes, and
    more compact than those of :func:`gilbert`.
    """
    bits = max(1, (max(grid.frames, grid.height, grid.width) - 1).bit_length())
    return _sort_video(grid, hilbert_index(_video_coordinates(grid), bits))


@lru_cache(maxsize=8)
def gilbert(grid: Grid) -> Tensor:
    """Along the generalized Hilbert curve, which fills a video of any size without leaving it.

    Blocks of 128 are more compact than those of :func:`hilbert`. Cached, because it takes seconds for 100,000 tokens.
    """
    cells = generalized_hilbert((grid.frames, grid.height, grid.width))
    frame, row, column = torch.tensor(list(cells)).T
    position = torch.empty_like(frame)
    position[(frame * grid.height + row) * grid.width + column] = torch.arange(grid.video)
    return _sort_video(grid, position)


def _video_coordinates(grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    frame, row, column, text = grid.coordinates()
    return frame[~text], row[~text], column[~text]


def _sort_video(grid: Grid, position: Tensor) -> Tensor:
    """Return the order that sorts the video tokens by ``position [video]`` and leaves the text in place."""
    order = torch.arange(grid.tokens)
    order[grid.before : grid.before + grid.video] = position.argsort(stable=True) + grid.before
    return order
