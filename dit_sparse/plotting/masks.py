"""Pictures of the mask of a plan."""

from __future__ import annotations

import math

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from dit_sparse.grid import BaseGrid, Grid
from dit_sparse.plan import BasePlan, Plan

from .style import LIGHT, SMALL_SIZE, TEXT_SIZE, Theme, finish, new_figure, style_axes

SIDE = 4.2  # inches of the block map


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
    across = math.ceil(math.sqrt(grid.frames * grid.height / grid.width))
    tall, wide = grid.height + max(1, grid.height // 5), grid.width + max(1, grid.width // 15)
    sheet = np.full((-(-grid.frames // across) * tall, across * wide), np.nan)
    for number, tokens in enumerate(keys):
        top, left = number // across * tall, number % across * wide
        sheet[top : top + grid.height, left : left + grid.width] = tokens
        axes.text(left - 0.5, top - 0.5, str(number), size=SMALL_SIZE - 2, color=theme.muted, va="bottom")
    axes.imshow(sheet, cmap=ListedColormap([theme.empty, theme.accent]), vmin=0, vmax=1, interpolation="nearest")
    axes.plot(
        frame % across * wide + column, frame // across * tall + row, "s",
        color=theme.highlight, markeredgecolor=theme.paper, markersize=6,
    )  # fmt: skip
    style_axes(axes, theme)
    axes.set(xticks=[], yticks=[], anchor="N")
    axes.set_xlabel(f"keys of one query (orange, in frame {frame}), frame by frame", size=TEXT_SIZE)
