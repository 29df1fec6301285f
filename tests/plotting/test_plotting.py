"""Figures: complete, inside their box, literal text, two themes, and SVG for a page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.text import Text

from dit_sparse import Grid, Site
from dit_sparse.methods import method
from dit_sparse.output.files import save_figure
from dit_sparse.plotting import plots
from dit_sparse.plotting.masks import plot_plan, terminal_map
from dit_sparse.plotting.style import DARK, LIGHT, Theme, contrast, figure_to_html, figure_to_svg, series_styles

HOSTILE = [
    "$\\frac{",
    "<script>alert(1)</script>",
    'a & b\'s "c"',
    "%d {0} {{ x }}",
    "bell\x07null\x00",
    "naïve 視頻",
    "0.12345",
]
NAMES = [*HOSTILE, *(f"method {i}" for i in range(25))]


def points() -> list[plots.Point]:
    draw = np.random.default_rng(0)
    return [
        plots.Point(f"{name} {density}", name, density, y, y - 1, y + 1, url=f"#row-{number}-{density}")
        for number, name in enumerate(NAMES)
        for density, y in zip((0.15, 0.25, 0.4), draw.normal(25, 4, 3), strict=True)
    ]


def plan_of(grid: Grid):
    nothing = torch.zeros(1, 1, grid.tokens, 8)
    return method("window", density=0.4).plan(nothing, nothing, nothing, Site(grid, 16), {})


GRID = Grid(3, 5, 7, after=11)
LINES = {name: [(n, n**1.5) for n in (1e3, 1e4, 1e5)] for name in NAMES}  # all in the same place
FIGURES = {
    "mask": lambda theme: plot_plan(plan_of(GRID), GRID, " ".join(HOSTILE), theme),
    "mask alone": lambda theme: plot_plan(plan_of(GRID), theme=theme),
    "heat map": lambda theme: plots.plot_heat_map(np.eye(6, 3), "x" * 90, ["abc"] * 6, HOSTILE, theme),
    "large heat map": lambda theme: plots.plot_heat_map(torch.rand(40, 24), " ".join(HOSTILE), theme=theme),
    "attention time": lambda theme: plots.plot_attention_time([2.0, 2.0, 1e-4], [1.0, 0.5, 0.0], HOSTILE[0], theme),
    "scaling": lambda theme: plots.plot_scaling(LINES, "W" * 200, " ".join(HOSTILE * 9), "tokens", "s", theme),
    "pareto": lambda theme: plots.plot_pareto(points(), "density", "PSNR (dB)", False, NAMES[:3], theme=theme),
    "narrow pareto": lambda theme: plots.plot_pareto(
        points(), "a rather long name of an axis", "PSNR (dB)", True, size=(3.3, 5), theme=theme
    ),
    "one point": lambda theme: plots.plot_pareto(points()[:1], "density", "PSNR (dB)", True, theme=theme),
    "intervals": lambda theme: plots.plot_intervals(points(), "density 0.25", "PSNR (dB)", (5, 40), theme),
}  # fmt: skip


@pytest.fixture(params=["light", "dark"])
def theme(request):
    return {"light": LIGHT, "dark": DARK}[request.param]


@cache
def drawn(name: str, theme: Theme) -> tuple[Figure, FigureCanvasAgg]:
    """Return a figure and the canvas that it is drawn on. Tests only read them."""
    figure = FIGURES[name](theme)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return figure, canvas


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_nothing_leaves_the_figure(name, theme):
    figure, canvas = drawn(name, theme)
    boxes = [figure.get_tightbbox(canvas.get_renderer()).transformed(figure.dpi_scale_trans)]
    boxes += [text.get_window_extent() for text in figure.texts if text.get_text()]
    for box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, box


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_text_contrasts_with_its_background(name, theme):
    figure, _ = drawn(name, theme)
    cells = {text: cell for axes in figure.axes for text, cell in zip(axes.texts, _cells(axes), strict=False)}
    for text in figure.findobj(Text):
        if text.get_text().strip() and text.get_visible():
            assert contrast(text.get_color(), cells.get(text, theme.paper)) >= 4.5, text


def _cells(axes) -> list:
    """Return the colours of the cells of a heat map."""
    return [color for mesh in axes.collections if isinstance(mesh, QuadMesh) for color in mesh.get_facecolors()]


def test_figures_leave_global_settings_alone():
    before = dict(rcParams)
    figure_to_svg(FIGURES["scaling"](LIGHT))
    assert dict(rcParams) == before


def test_mask_shows_every_kept_block_and_every_frame():
    plan = plan_of(GRID)
    blocks, frames = plot_plan(plan, GRID, "window").axes
    drawn = np.asarray(blocks.images[0].get_array())
    assert np.array_equal(drawn, plan.block_mask()[0, 0].numpy())
    query = GRID.before + GRID.frames // 2 * GRID.frame + GRID.height // 2 * GRID.width + GRID.width // 2
    keys = plan.token_mask(torch.tensor([query]))[0, 0, 0, GRID.before : GRID.before + GRID.video]
    tiles = frames.images[0].get_array()
    assert np.nansum(tiles) == keys.sum() and np.isfinite(np.ma.filled(tiles, np.nan)).sum() == GRID.video
    assert [text.get_text() for text in frames.texts] == ["0", "1", "2"]
    assert len(terminal_map(plan).splitlines()) == max(1, min(64, plan.blocks) // 2)


def test_heat_map_prints_every_value_with_its_label():
    values = np.arange(6).reshape(3, 2) / 10
    (axes,) = plots.plot_heat_map(values, "mass", ["ab", "cd", "ef"]).axes
    assert [text.get_text() for text in axes.texts] == ["a 0.00", "b 0.10", "c 0.20", "d 0.30", "e 0.40", "f 0.50"]


def test_series_differ_by_more_than_color():
    """Two series of one colour differ in their marker, and coinciding lines of neighbours in dashes and marker."""
    styles = list(series_styles([str(i) for i in range(70)], LIGHT).values())
    assert len({(style["color"], style["marker"]) for style in styles}) == 70
    for one, other in pairwise(styles):
        assert not any(one[key] == other[key] for key in ("color", "marker", "linestyle"))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40).map(sorted), st.floats(0.01, 0.2))
def test_labels_are_spread_out_in_order(heights, apart):
    moved = plots.spread_out(heights, apart)
    room = min(apart, 1 / max(len(heights) - 1, 1))
    assert (np.diff(moved) >= room - 1e-9).all() and moved[0] >= -1e-9 and moved[-1] <= 1 + 1e-9
    assert np.allclose(plots.spread_out(list(moved), room - 1e-9), moved), "labels that have room stay"


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=30), st.booleans())
def test_no_point_beats_the_pareto_front(places, larger_is_better):
    points = [plots.Point("", "", x, y) for x, y in places]
    front = plots.pareto_front(points, larger_is_better)
    cost = lambda point: -point.x if larger_is_better else point.x
    beats = lambda a, b: cost(a) <= cost(b) and a.y >= b.y and (cost(a), a.y) != (cost(b), b.y)
    assert front and not any(beats(point, best) for point in points for best in front)
    assert all(any(beats(best, p) or (best.x, best.y) == (p.x, p.y) for best in front) for p in points)


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_svg_has_every_label_and_the_colors_of_the_theme(name):
    svg = figure_to_svg(FIGURES[name](LIGHT), label="a <chart>")
    root = ET.fromstring(svg)
    assert root.get("aria-label") == "a <chart>" and not list(root.iter("script"))
    text = " ".join(root.itertext())
    expected = NAMES if "pareto" in name or name == "scaling" else []
    for label in expected:
        assert "".join(c if c.isprintable() else "\ufffd" for c in label) in text
    colors = {color for color in re.findall(r"(?:fill|stroke): (#\w+)", svg)}
    assert not colors & set(LIGHT.css_variables().values()), "all are CSS variables"
    ids = re.findall(r' id="([^"]*)"', svg)
    assert len(ids) == len(set(ids)) and all(f"#{one}" in svg for one in ids)


def test_svg_is_reproducible_and_links_are_named():
    draw = lambda: figure_to_svg(FIGURES["pareto"](LIGHT), label="x", titles={"#row-9-0.25": "PSNR 25"})
    assert draw() == draw()
    root = ET.fromstring(draw())
    links = root.findall(".//a")
    assert len(links) == len(points()) + len(NAMES)
    assert len([link for link in links if link.get("tabindex") != "-1"]) == len(NAMES), "one tab stop per series"
    (named,) = [link for link in links if link.get("aria-label")]
    assert named.get("href") == "#row-9-0.25" and named.findtext("title") == "PSNR 25"
    assert figure_to_html(FIGURES["pareto"](LIGHT)).startswith("<div")


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_figures_are_written_whole_or_not_at_all(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"x{suffix}"
    figure = FIGURES["mask alone"](LIGHT)
    save_figure(path, figure)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_figure(path, figure)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == content


def test_scaling_requires_positive_points_and_has_round_ticks():
    for lines in ({}, {"a": []}, {"a": [(1, 0)]}):
        with pytest.raises(ValueError, match="at least one point"):
            plots.plot_scaling(lines, "title", "subtitle", "x", "y")
    canvas = FigureCanvasAgg(plots.plot_scaling({"a": [(2e3, 0.02), (5e6, 5)]}, "title", "subtitle", "x", "y"))
    canvas.draw()
    (axes,) = canvas.figure.axes
    assert {"2k", "1M"} <= {label.get_text() for label in axes.get_xticklabels()}
    assert {"0.02", "0.1", "5"} <= {label.get_text() for label in axes.get_yticklabels()}
