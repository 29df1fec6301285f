"""Figures: complete, inside their box, literal text, both themes, and SVG for a page."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dit_sparse import Grid, Site
from dit_sparse.methods import method
from dit_sparse.plotting import charts
from dit_sparse.plotting.masks import plot_plan
from dit_sparse.plotting.style import DARK, LIGHT

HOSTILE = ["$\\frac{", "<script>alert(1)</script>", 'a & b\'s "c"', "%d {0} {{ x }}", "bell\x07null\x00", "naïve 視頻"]
NAMES = [*HOSTILE, *(f"method {i}" for i in range(25))]


def points() -> list[charts.Point]:
    draw = np.random.default_rng(0)
    return [
        charts.Point(f"{name} {density}", name, density, y, y - 1, y + 1, url=f"#row-{name}-{density}")
        for name in NAMES
        for density, y in zip((0.15, 0.25, 0.4), draw.normal(25, 4, 3), strict=True)
    ]


def plan_of(grid: Grid):
    nothing = torch.zeros(1, 1, grid.tokens, 8)
    return method("window", density=0.4).plan(nothing, nothing, Site(grid, 16), {})


GRID = Grid(3, 5, 7, after=11)
LINES = {name: [(n, n**1.5) for n in (1e3, 1e4, 1e5)] for name in NAMES}  # all in the same place
FIGURES = {
    "mask": lambda theme: plot_plan(plan_of(GRID), GRID, " ".join(HOSTILE), theme),
    "mask alone": lambda theme: plot_plan(plan_of(GRID), theme=theme),
    "heat map": lambda theme: charts.plot_heat_map(np.eye(6, 3), "x" * 90, ["abc"] * 6, HOSTILE, theme),
    "large heat map": lambda theme: charts.plot_heat_map(torch.rand(40, 24), " ".join(HOSTILE), theme=theme),
    "attention time": lambda theme: charts.plot_attention_time([2.0, 2.0, 1e-4], [1.0, 0.5, 0.0], HOSTILE[0], theme),
    "scaling": lambda theme: charts.plot_scaling(LINES, "W" * 200, " ".join(HOSTILE * 9), "tokens", "s", theme),
    "pareto": lambda theme: charts.plot_pareto(points(), "density", "PSNR (dB)", False, NAMES[:3], theme=theme),
    "narrow pareto": lambda theme: charts.plot_pareto(
        points(), "a rather long name of an axis", "PSNR (dB)", True, size=(3.3, 5), theme=theme
    ),
    "one point": lambda theme: charts.plot_pareto(points()[:1], "density", "PSNR (dB)", True, theme=theme),
    "intervals": lambda theme: charts.plot_intervals(points(), "density 0.25", "PSNR (dB)", (5, 40), theme),
}  # fmt: skip


@pytest.fixture(params=["light", "dark"])
def theme(request):
    return {"light": LIGHT, "dark": DARK}[request.param]


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_nothing_leaves_the_figure(name, theme):
    figure = FIGURES[name](theme)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [figure.get_tightbbox(canvas.get_renderer()).transformed(figure.dpi_scale_trans)]
    boxes += [text.get_window_extent() for text in figure.texts if text.get_text()]
    for box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, box
