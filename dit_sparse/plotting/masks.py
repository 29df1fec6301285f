"""Pictures of the mask of a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dit_sparse.grid import BaseGrid, Grid
from dit_sparse.plan import BasePlan, Plan

from .style import LIGHT, SMALL_SIZE, TEXT_SIZE, Theme, finish, new_figure, style_axes

SIDE = 4.2  # inches of the block map
GALLERY_COLUMNS, PANEL_HEIGHT = 3, 1.45  # panels in a row, inches of one


class MaskPanel(NamedTuple):
    """A mask in a gallery.

    Attributes:
        title: name of the method.
        pairs: shares of kept pairs in 0..1, queries by keys.
        keys: the keys of one query, ``[F, H, W]`` in 0..1.
        query: number of this query in ``keys``.
    """

    title: str
    pairs: NDArray
    keys: NDArray
    query: int


def plot_plan(plan: BasePlan, grid: BaseGrid | None = None, title: str | None = None, theme: Theme = LIGHT) -> Figure:
    """Plot the block or cluster mask of the first head and, with frames, the keys of one query frame by frame.

    Args:
        grid: the token grid of the plan. None, or voxels: the block mask is drawn alone.
        title: None for the density alone.
    """
    density = f"density {plan.density:.3f}"
    title = f"{title}, {density}" if title else density
    if grid is not None:
        title += f", {grid} tokens"
    has_frames = isinstance(grid, Grid)
    figure = new_figure(SIDE * (1 + has_frames) + 0.9, SIDE + 0.5, theme, title)
    panels = figure.subplots(1, 1 + has_frames, squeeze=False)[0]
    _plot_block_mask(panels[0], plan, theme)
    if has_frames:
        _plot_keys_of_one_query(panels[1], plan, grid, theme)
    return finish(figure)


def plot_gallery(panels: Sequence[MaskPanel], note: str, theme: Theme = LIGHT) -> Figure:
    """Plot several masks: for each the kept pairs, and the keys of one query frame by frame."""
    rows = -(-len(panels) // GALLERY_COLUMNS)
    figure = new_figure(9.6, PANEL_HEIGHT * rows, theme, notes=[note])
    axes = figure.subplots(rows, 2 * GALLERY_COLUMNS, squeeze=False, width_ratios=[1, 1.7] * GALLERY_COLUMNS)
    for one in axes.flat:
        one.set_axis_off()
    for panel, (left, right) in zip(panels, axes.reshape(-1, 2), strict=False):
        left.imshow(panel.pairs, cmap=theme.color_map(), vmin=0, vmax=1, aspect="auto", interpolation="antialiased")
        left.set_box_aspect(1)
        left.set_title(panel.title, loc="left", size=TEXT_SIZE, color=theme.ink, pad=3)
        frames, height, width = panel.keys.shape
        sheet, place = _frame_sheet(panel.keys, -(-frames // 2))
        right.imshow(sheet, cmap=theme.color_map(), vmin=0, vmax=1, interpolation="nearest")
        right.set_anchor("W")
        frame, (row, column) = panel.query // (height * width), divmod(panel.query % (height * width), width)
        top, left_edge = place(frame)
        right.plot(left_edge + column, top + row, "s", color=theme.highlight, markersize=3)
    return finish(figure)


def terminal_map(plan: BasePlan, columns: int = 64) -> str:
    """Return the block mask of the first head as lines of characters; darker characters keep more blocks."""
    shades = " .:-=+*#%@"
    keep = plan.block_mask()[0, 0].float()[None, None]
    size = min(columns, keep.shape[-2])
    shrunk = torch.nn.functional.adaptive_avg_pool2d(keep, (max(1, size // 2), size))[0, 0]
    level = (shrunk * (len(shades) - 1)).ceil().long()
    return "\n".join("".join(shades[i] for i in row) for row in level.tolist())


def _plot_block_mask(axes: Axes, plan: BasePlan, theme: Theme) -> None:
    mask = plan.block_mask()[0, 0].cpu().numpy()
    axes.imshow(mask, cmap=ListedColormap([theme.empty, theme.accent]), vmin=0, vmax=1, aspect="auto")
    axes.set_box_aspect(1)
    style_axes(axes, theme)
    group = "block" if isinstance(plan, Plan) else "cluster"
    axes.set(xlabel=f"key {group} (of {mask.shape[1]})", ylabel=f"query {group} (of {mask.shape[0]})")


def _plot_keys_of_one_query(axes: Axes, plan: BasePlan, grid: Grid, theme: Theme) -> None:
    """Draw the frames as tiles in reading order; the query is the token in the middle of the video."""
    frame, row, column = grid.frames // 2, grid.height // 2, grid.width // 2
    query = grid.before + frame * grid.frame + row * grid.width + column
    keys = plan.token_mask(torch.tensor([query], device=plan.count.device))[0, 0, 0].cpu()
    keys = keys[grid.before : grid.before + grid.video].view(grid.frames, grid.height, grid.width).numpy()
    sheet, place = _frame_sheet(keys, math.ceil(math.sqrt(grid.frames * grid.height / grid.width)))
    for number in range(grid.frames):
        top, left = place(number)
        axes.text(left - 0.5, top - 0.5, str(number), size=SMALL_SIZE - 2, color=theme.muted, va="bottom")
    axes.imshow(sheet, cmap=ListedColormap([theme.empty, theme.accent]), vmin=0, vmax=1, interpolation="nearest")
    top, left = place(frame)
    style = {"color": theme.highlight, "markeredgecolor": theme.paper, "markersize": 6}
    axes.plot(left + column, top + row, "s", **style)
    style_axes(axes, theme)
    axes.set(xticks=[], yticks=[], anchor="N")
    axes.set_xlabel(f"keys of one query (orange, in frame {frame}), frame by frame", size=TEXT_SIZE)


def _frame_sheet(frames: NDArray, across: int) -> tuple[NDArray, Callable[[int], tuple[int, int]]]:
    """Return ``frames [F, H, W]`` as tiles in reading order, and a function of the number of a frame that returns its
    first row and column there."""
    count, height, width = frames.shape
    tall, wide = height + max(1, height // 5), width + max(1, width // 15)
    place = lambda number: (number // across * tall, number % across * wide)
    sheet = np.full((-(-count // across) * tall, across * wide), np.nan)
    for number, tokens in enumerate(frames):
        top, left = place(number)
        sheet[top : top + height, left : left + width] = tokens
    return sheet, place
