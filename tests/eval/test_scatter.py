"""The charts of a comparison's page: round axes, and names that cover nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dit_sparse.eval.report import page, scatter

LARGEST = Path(__file__).parents[2] / "eval" / "results" / "cpu" / "compare.json"


def test_axes_are_round_and_hold_everything():
    for values in ([0.31, 0.9], [25.0], [17.2, 31.9, 18.4], [-3.0, 2.0], [1e-3, 2e-3]):
        axis = scatter._Axis.around(values, 0.1)
        assert axis.low <= min(values) <= max(values) <= axis.high
        assert 3 <= len(axis.ticks()) <= 12
        assert all(0 <= axis.place(value) <= 1 for value in values)


def apart(a, b) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def assert_names_cover_nothing(chart):
    names = list(chart.names.values())
    for name in names:
        others = [other.box for other in names if other is not name]
        assert all(apart(name.box, box) for box in (*others, *(mark.box for mark in chart.marks))), name
        left, top, right, bottom = name.box
        assert left >= scatter.LEFT and top >= scatter.TOP, name
        assert right <= scatter.WIDTH and bottom <= scatter.HEIGHT - scatter.BOTTOM, name
        for part in np.linspace(0, 1, 200) if name.leader else ():
            x, y = (1 - part) * np.array(name.leader[0]) + part * np.array(name.leader[1])
            assert all(apart((x, y, x, y), box) for box in others), name


@pytest.mark.parametrize("x", ["density_run", "speedup"])
def test_every_name_of_the_charts_is_readable(x):
    rows = page.compared(json.loads(LARGEST.read_text()))
    chart = scatter.Scatter(rows, x, "psnr")
    assert len(rows) > 40 and set(chart.names) == set(map(scatter.line_of, rows))
    assert_names_cover_nothing(chart)


@pytest.mark.parametrize("seed", range(3))
def test_names_cover_nothing_wherever_the_marks_lie(seed):
    """Crowded at one place: not every line finds room for its name, but those that do are readable."""
    draw = np.random.default_rng(seed)
    crowd = [
        {"method": f"method {i % 30}", "density_asked": 0.2, "density_run": i, "x": x, "y": {"mean": y}}
        for i, (x, y) in enumerate([(0, 0), (9, 9), *draw.normal(4, 0.3, (88, 2))])
    ]
    assert_names_cover_nothing(scatter.Scatter(crowd, "x", "y"))
