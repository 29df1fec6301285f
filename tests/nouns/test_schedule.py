"""Schedules: which calls stay dense, and which make a new plan."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dit_sparse import Grid, Schedule, Site


@given(st.integers(1, 100), st.data())
def test_fractions_of_the_steps_are_rounded_down(steps, data):
    count = data.draw(st.integers(0, steps))
    assert Schedule(dense_steps=count / steps).first_sparse_step(steps) == count
    assert Schedule(dense_steps=count).first_sparse_step(steps) == count
    assume(count < steps)
    assert Schedule(dense_steps=(count + 0.5) / steps).first_sparse_step(steps) == count


def test_first_steps_and_first_layers_stay_dense():
    schedule = Schedule(dense_steps=0.3, dense_layers=0.25)
    site = lambda step, layer: Site(Grid(1, 1, 1), layer=layer, layers=8, step=step, steps=10)
    dense = [[schedule.is_dense(site(step, layer)) for layer in range(8)] for step in range(10)]
    assert dense == [[step < 3 or layer < 2 for layer in range(8)] for step in range(10)]


@pytest.mark.parametrize("dense_steps", [0, 3, 0.0])
def test_counts_need_no_number_of_steps(dense_steps):
    schedule = Schedule(dense_steps=dense_steps)
    assert [schedule.is_dense(Site(Grid(1, 1, 1), step=step)) for step in (2, 3)] == [dense_steps == 3, False]


def test_a_fraction_of_an_unknown_number_of_steps_is_refused():
    with pytest.raises(ValueError, match=r"steps is unknown.*pass steps="):
        Schedule(dense_steps=0.2).is_dense(Site(Grid(1, 1, 1), step=0, steps=None))


@pytest.mark.parametrize(
    "settings",
    [
        {"dense_steps": -1}, {"dense_steps": 1.5}, {"dense_layers": -0.1}, {"replan_interval": 0}, {"dense_steps": "x"},
        {"dense_layers": None}, {"dense_steps": True}, {"dense_steps": float("nan")}, {"replan_interval": "\n"},
        {"replan_interval": True}, {"replan_interval": "x" * 10**6}, {"per_branch": "no"}, {"per_branch": 2},
    ],
    ids=lambda settings: str(settings)[:40],
)  # fmt: skip
def test_values_of_wrong_type_or_range_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))) as error:
        Schedule(**settings)
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)
