"""Schedules: which calls stay dense, and which make a new plan."""

from __future__ import annotations

from itertools import pairwise

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
        {"density_ramp": (1, 0)}, {"density_ramp": 1.3}, {"density_ramp": "12"}, {"density_ramp": (1, 2, 3)},
        {"density_ramp": (float("nan"), 1)},
    ],
    ids=lambda settings: str(settings)[:40],
)  # fmt: skip
def test_values_of_wrong_type_or_range_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))) as error:
        Schedule(**settings)
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


# --- the density of a step


@given(
    st.floats(0.01, 1), st.floats(0.05, 5), st.floats(0.05, 5), st.integers(1, 60), st.integers(0, 9), st.integers(1, 7)
)
def test_the_mean_over_the_sparse_steps_is_the_density(density, first, last, sparse, dense, interval):
    """It is monotonic, at most 1, and constant between two plans."""
    schedule = Schedule(dense_steps=dense, replan_interval=interval, density_ramp=(first, last))
    site = lambda step: Site(Grid(1, 1, 1), step=step, steps=dense + sparse)
    densities = [schedule.density_at(site(step), density) for step in range(dense, dense + sparse)]
    assert sum(densities) / sparse == pytest.approx(density)
    assert all(0 < one <= 1 + 1e-9 for one in densities)
    assert densities == [densities[step // interval * interval] for step in range(sparse)]
    rising = [(after - before) * (last - first) for before, after in pairwise(densities)]
    assert all(difference >= -1e-9 for difference in rising)
    assert all(schedule.density_at(site(step), density) == densities[0] for step in range(dense))


def test_the_ramp_of_1_3_and_0_6_in_eight_steps():
    site = lambda step: Site(Grid(1, 1, 1), step=step, steps=8)
    schedule = Schedule(dense_steps=2, density_ramp=(1.3, 0.6), replan_interval=1)
    factors = [schedule.density_at(site(step), 0.1) / 0.1 for step in range(2, 8)]
    assert factors == pytest.approx([(1.3 - 0.14 * i) / 0.95 for i in range(6)])
    assert Schedule(dense_steps=2).density_at(site(2), 0.3, (1.3, 0.6)) == pytest.approx(0.3 * 1.23 / 0.95)
    assert Schedule(dense_steps=2, density_ramp=(1, 1)).density_at(site(2), 0.3, (1.3, 0.6)) == 0.3
    assert Schedule(dense_steps=7, density_ramp=(2, 1)).density_at(site(7), 0.3) == 0.3


def test_only_the_ramp_of_a_schedule_needs_the_number_of_steps():
    site = Site(Grid(1, 1, 1), step=3)
    assert Schedule(dense_steps=1).density_at(site, 0.3, (1.3, 0.6)) == 0.3
    with pytest.raises(ValueError, match="pass steps="):
        Schedule(dense_steps=1, density_ramp=(1.3, 0.6)).density_at(site, 0.3)


def test_the_last_dense_step_of_layers_that_become_sparse():
    schedule = Schedule(dense_steps=0.25, dense_layers=1)
    site = lambda step, layer: Site(Grid(1, 1, 1), layer=layer, layers=3, step=step, steps=8)
    last = [(step, layer) for step in range(8) for layer in range(3) if schedule.is_last_dense(site(step, layer))]
    assert last == [(1, 1), (1, 2)]
    assert not any(Schedule(dense_steps=0).is_last_dense(site(step, 1)) for step in range(8))
