"""Charts of measurements: heat maps, bars, scaling lines, Pareto plots and confidence intervals."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import offset_copy
from numpy.typing import ArrayLike

from .style import (
    LIGHT,
    SMALL_SIZE,
    TEXT_SIZE,
    Theme,
    contrast,
    finish,
    new_figure,
    printable,
    series_styles,
    style_axes,
)


class Point(NamedTuple):
    """One row of a comparison in a Pareto plot or among confidence intervals.

    Attributes:
        name: of the row.
        series: points of one series are joined, in order of ``x``.
        x, y: cost or speed, and quality.
        low, high: ends of the confidence interval of ``y``; None without one.
        size: diameter of the marker in points.
        url: address that the marker links to in SVG.
    """

    name: str
    series: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    size: float = 5.0
    url: str = ""


def plot_heat_map(
    values: ArrayLike,
    title: str,
    labels: Sequence[str] | None = None,
    legend: Sequence[str] = (),
    theme: Theme = LIGHT,
) -> Figure:
    """Plot ``values [layers, heads]`` in 0..1 with their numbers.

    Args:
        labels: a string for each layer with a letter for each head, printed before the numbers.
        legend: lines below the map.
    """
    values = torch.as_tensor(values).double().cpu().numpy()
    layers, heads = values.shape
    width = max(5.0, (0.6 if labels else 0.5) * heads + 1)
    figure = new_figure(width, 0.3 * layers + 0.4, theme, title, legend)
    axes = figure.subplots()
    axes.pcolormesh(values, cmap=theme.color_map(), vmin=0, vmax=1, edgecolors=theme.paper, linewidth=1.5)
    for (layer, head), value in np.ndenumerate(values):
        text = f"{labels[layer][head]} {value:.2f}" if labels else f"{value:.2f}"
        color = max(("black", "white"), key=lambda ink: contrast(ink, theme.color_map()(value)))
        axes.text(head + 0.5, layer + 0.5, text, size=SMALL_SIZE, color=color, ha="center", va="center")
    style_axes(axes, theme)
    axes.invert_yaxis()
    axes.set(xlabel="head", ylabel="layer")
    axes.xaxis.set(ticks_position="top", label_position="top")
    for axis, count in ((axes.xaxis, heads), (axes.yaxis, layers)):
        axis.set_ticks(np.arange(count) + 0.5, map(str, range(count)))
    return finish(figure)


def plot_attention_time(dense: Sequence[float], sparse: Sequence[float], method: str, theme: Theme = LIGHT) -> Figure:
    """Plot the seconds of attention in each denoising step of a dense and a sparse run as pairs of bars."""
    figure = new_figure(6.4, 2.9, theme, "Attention time per denoising step")
    axes = figure.subplots()
    steps = np.arange(len(dense))
    axes.bar(steps - 0.2, dense, 0.38, facecolor=theme.empty, edgecolor=theme.muted, linewidth=0.8, label="dense")
    axes.bar(steps + 0.2, sparse, 0.38, color=theme.accent, label=printable(method))
    style_axes(axes, theme, grid="y")
    place = {"loc": "lower left", "bbox_to_anchor": (-0.01, 1), "ncols": 2, "borderpad": 0}
    axes.legend(frameon=False, fontsize=TEXT_SIZE, labelcolor=theme.ink, **place)
    axes.set(xlabel="denoising step", ylabel="attention time (s)", xlim=(-0.6, len(dense) - 0.4))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    return finish(figure)


def plot_scaling(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    subtitle: str,
    x_label: str,
    y_label: str,
    theme: Theme = LIGHT,
) -> Figure:
    """Plot lines on two logarithmic axes, with their names next to their ends.

    Args:
        lines: positive ``(x, y)`` of each name, in ascending order of x.

    Raises:
        ValueError: there are no points, or one is not positive.
    """
    lines = {name: np.asarray(points, float) for name, points in lines.items() if len(points)}
    if not lines or min(points.min() for points in lines.values()) <= 0:
        raise ValueError("plot_scaling requires at least one point, and positive x and y")
    figure = new_figure(9.6, max(4.8, 0.2 * len(lines) + 1), theme, title, [subtitle])
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
    style_axes(axes, theme, grid="both")
    with_prefix = EngFormatter(sep="")  # 20k; small numbers stay as they are
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda x, _: with_prefix(x) if x >= 1000 else f"{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    styles = series_styles(list(lines), theme)
    places = {name: {tuple(place) for place in np.log(points).round(2)} for name, points in lines.items()}
    for number, (name, points) in enumerate(lines.items()):
        # A line is wider than later ones in the same place, so that its border stays visible.
        later = min(2, sum(len(places[name] & places[other]) > 1 for other in list(lines)[number + 1 :]))
        (line,) = axes.plot(*points.T, **styles[name], linewidth=1.3 + 1.2 * later, markersize=4.5 + 2 * later)
        line.set(markeredgecolor=theme.paper, markeredgewidth=0.5, dash_capstyle="butt")
    _label_ends(axes, {name: tuple(points[-1]) for name, points in lines.items()}, styles)
    return finish(figure)


def plot_pareto(
    points: Sequence[Point],
    x_label: str,
    y_label: str,
    larger_x_is_better: bool,
    baselines: Collection[str] = (),
    size: tuple[float, float] = (6.2, 5.4),
    theme: Theme = LIGHT,
) -> Figure:
    """Plot quality against cost or speed, with a line for each series and a pale band along the Pareto front.

    Args:
        baselines: series in the secondary text colour.
        size: inches.
    """
    series: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.x):
        series.setdefault(point.series, []).append(point)
    figure = new_figure(size[0], max(size[1], 0.18 * len(series) + 1), theme)
    axes = figure.subplots()
    axes.margins(x=0.05, y=0.05)
    axes.set_xlabel(x_label, loc="left")
    axes.set_title(y_label, loc="left", size=TEXT_SIZE, color=theme.muted, pad=8)
    style_axes(axes, theme, grid="both")
    names = sorted(series, key=lambda name: (name in baselines, len(series[name]) == 1, name))
    styles = series_styles(names, theme)
    for name in styles.keys() & set(baselines):
        styles[name]["color"] = theme.muted
    front = [(point.x, point.y) for point in pareto_front(points, larger_x_is_better)]
    (band,) = axes.plot(*zip(*front, strict=True), color=theme.ink, alpha=0.09, linewidth=11, zorder=1)
    band.set(solid_capstyle="round", solid_joinstyle="round")
    for number, (name, line) in enumerate(series.items()):
        x, y, sizes = [p.x for p in line], [p.y for p in line], [p.size**2 for p in line]
        color, marker, dashes = styles[name].values()
        (joined,) = axes.plot(x, y, color=color, linestyle=dashes, linewidth=1, alpha=0.55, zorder=2)
        marks = axes.scatter(x, y, sizes, color, marker, edgecolors=theme.paper, linewidths=0.4, zorder=3)
        marks.set_urls([p.url for p in line])
        for artist in (joined, marks):
            artist.set_gid(f"series-{number}")
    ends = {name: (line[-1].x, line[-1].y) for name, line in series.items()}
    _label_ends(axes, ends, styles, {name: line[0].url for name, line in series.items()})
    return finish(figure)


def pareto_front(points: Sequence[Point], larger_x_is_better: bool) -> list[Point]:
    """Return the points for which no other is at least as good in both and better in one, in ascending order of x.

    Values of x that round to the same hundredth count as equal.
    """
    sign = 1 if larger_x_is_better else -1
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (round(sign * p.x, 2), p.y), reverse=True):
        if not front or point.y > front[-1].y:
            front.append(point)
    return sorted(front, key=lambda point: point.x)


def plot_intervals(
    points: Sequence[Point], title: str, x_label: str, limits: tuple[float, float], theme: Theme = LIGHT
) -> Figure:
    """Plot the ``y`` of each point and its confidence interval on a horizontal axis, the first point on top."""
    figure = new_figure(3.4, 0.2 * len(points) + 0.5, theme, title)
    axes = figure.subplots()
    rows = np.arange(len(points))
    low = [point.y if point.low is None else point.low for point in points]
    high = [point.y if point.high is None else point.high for point in points]
    axes.hlines(rows, low, high, color=theme.accent, alpha=0.45, linewidth=2)
    axes.plot([point.y for point in points], rows, "o", color=theme.accent, markersize=4.5)
    style_axes(axes, theme, grid="x")
    axes.set(xlim=limits, ylim=(len(points) - 0.4, -0.6))
    axes.set_xlabel(x_label, loc="left")
    axes.set_yticks(rows, [printable(point.name) for point in points], color=theme.ink)
    for label, point in zip(axes.get_yticklabels(), points, strict=True):
        label.set_url(point.url)
    return finish(figure)


def _label_ends(
    axes: Axes,
    ends: Mapping[str, tuple[float, float]],
    styles: Mapping[str, Mapping],
    urls: Mapping[str, str] | None = None,
) -> None:
    """Write the names in a column right of the axes, each with its marker and a thin line to its end."""
    figure = finish(axes.get_figure())
    figure.get_layout_engine().execute(figure)
    line_height = 1.45 * SMALL_SIZE / 72 * figure.dpi / axes.get_window_extent().height
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = {name: to_axes.transform(end)[1] for name, end in ends.items()}
    names = sorted(ends, key=heights.__getitem__)
    column = dict(zip(names, spread_out([heights[name] for name in names], line_height), strict=True))
    key_place, text_place = (offset_copy(axes.transAxes, figure, x, units="points") for x in (8, 15))
    for number, name in enumerate(ends):
        color, marker, _ = styles[name].values()
        arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 3}
        label = axes.annotate(
            printable(name), ends[name], (1, column[name]), xycoords="data", textcoords=text_place,
            size=SMALL_SIZE, color=color, va="center", annotation_clip=False, arrowprops=arrow | {"relpos": (0, 0.5)},
        )  # fmt: skip
        (key,) = axes.plot(1, column[name], marker, color=color, markersize=4.5, transform=key_place, clip_on=False)
        label.set_url((urls or {}).get(name))
        for artist in (label, label.arrow_patch, key):
            artist.set_gid(f"series-{number}")


def spread_out(heights: Sequence[float], apart: float) -> np.ndarray:
    """Move ascending heights in 0..1 as little as possible so that neighbours are at least ``apart`` apart, if they
    fit."""
    apart = min(apart, 1 / max(len(heights) - 1, 1))
    groups: list[list[float]] = []  # heights minus their offset from the first; labels of a group are adjacent
    for number, height in enumerate(heights):
        groups.append([height - number * apart])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    starts = np.concatenate([[np.mean(group)] * len(group) for group in groups])
    return np.clip(starts, 0, 1 - apart * (len(heights) - 1)) + apart * np.arange(len(heights))
