"""The profile search: candidates, their measurement, and the choice among them."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse import Grid, Plan, Schedule, Site, prepare
from dit_sparse.kernels.executors import reference
from dit_sparse.method import AttentionOutput
from dit_sparse.methods.patterns.moa import MoA
from dit_sparse.methods.patterns.radial import Radial
from dit_sparse.profiling.candidates import Candidate, have_one_density, parse_candidates
from dit_sparse.profiling.choice import choose, choose_least_error, select
from dit_sparse.profiling.probe import measure_candidates, measured_steps, squared_error
from tiny_pipelines import ALL


def random_tables(seed: int, layers=2, heads=2, candidates=4) -> tuple[torch.Tensor, torch.Tensor]:
    """Return errors and densities, ``[candidates, layers, heads]``; the first candidate is dense."""
    generator = torch.Generator().manual_seed(seed)
    error = torch.rand(candidates, layers, heads, generator=generator)
    density = 0.05 + 0.6 * torch.rand(candidates, 1, 1, generator=generator).expand_as(error)
    error[0], density = 0, torch.cat([torch.ones(1, layers, heads), density[1:]])
    return error, density


@given(st.integers(0, 10_000), st.floats(0.1, 1.0))
def test_choice_meets_the_density_and_is_nearly_optimal(seed, target):
    error, density = random_tables(seed)
    if target < density.amin(0).mean():
        with pytest.raises(ValueError, match="sparse enough"):
            choose(error, density, target_density=target)
        return
    choice = choose(error, density, target_density=target)
    mean = lambda table, choice: float(select(table, choice).mean())
    assert mean(density, choice) <= target + 1e-5
    all_choices = [torch.tensor(numbers).view(2, 2) for numbers in itertools.product(range(4), repeat=4)]
    optimum = min(mean(error, c) for c in all_choices if mean(density, c) <= target)
    assert mean(error, choice) <= optimum + 0.26, "off by more than one head"
    assert choice.equal(choose(error, density, target_density=target))


@given(st.integers(0, 10_000), st.floats(0.05, 0.9))
def test_choice_meets_the_error(seed, max_error):
    error, density = random_tables(seed)
    choice = choose(error, density, max_error=max_error)
    assert float(select(error, choice).mean()) ** 0.5 <= max_error + 1e-6


def test_choice_at_one_density_has_the_least_error():
    error, _ = random_tables(5)
    choice = choose_least_error(error)
    assert (choice > 0).all() and select(error, choice).equal(error[1:].amin(0))


@given(st.integers(0, 10_000), st.floats(0.2, 1.0))
def test_choice_meets_the_density_at_every_length(seed, target):
    """Densities of the candidates differ between two lengths."""
    error, short = random_tables(seed)
    long = torch.cat([short[:1], (short[1:] * 1.3 - 0.1).clamp(0.05, 1)])
    density, mean = torch.stack([short, long]), lambda table, choice: float(select(table, choice).mean())
    worst = lambda choice: max(mean(short, choice), mean(long, choice))
    all_choices = [torch.tensor(numbers).view(2, 2) for numbers in itertools.product(range(4), repeat=4)]
    allowed = [choice for choice in all_choices if worst(choice) <= target]
    try:
        choice = choose(error, density, target_density=target)
    except ValueError:
        assert target <= float(density.mean(0).amin(0).mean()) + 0.1, "the sparsest candidates exceed the target"
        return
    assert worst(choice) <= target + 1e-5
    assert mean(error, choice) <= min(mean(error, c) for c in allowed) + 0.3, "off by about one head"


def test_larger_error_allows_smaller_density():
    error, density = random_tables(3, 8, 8, 9)
    densities = [float(select(density, choose(error, density, max_error=e)).mean()) for e in (0.1, 0.3, 0.6)]
    assert densities == sorted(densities, reverse=True) and densities[0] > densities[-1]


@pytest.mark.parametrize("targets", [{}, {"target_density": 0.3, "max_error": 0.1}], ids=["none", "both"])
def test_choice_needs_exactly_one_target(targets):
    with pytest.raises(ValueError, match="either a target density or a maximum error"):
        choose(*random_tables(0), **targets)


def test_candidates_at_several_densities():
    candidates = parse_candidates("radial, vdit", 0.2)
    assert [candidate.name for candidate in candidates[:2]] == ["dense", "radial"]
    names = {"dense", "radial", "svg.spatial", "svg.temporal", "vdit.vertical", "vdit.skip"}
    assert {candidate.name for candidate in candidates} == names
    densities = lambda candidates: [c.method.density for c in candidates if c.name == "radial"]
    assert densities(candidates) == pytest.approx([0.08, 0.14, 0.2, 0.3, 0.5])
    assert densities(parse_candidates("radial", 0.2, (1.0,))) == [0.2]


def test_spans_of_moa_have_no_density():
    """Their densities follow from the length of the video; with them, heads may differ in density."""
    candidates = parse_candidates("moa,radial", 0.25, (1.0,))
    spans = [one.method for one in candidates if isinstance(one.method, MoA)]
    assert len(spans) == len({(one.alpha, one.beta) for one in spans}) == 28
    assert all(one.settings == {} for one in candidates if isinstance(one.method, MoA))
    assert not have_one_density(candidates) and have_one_density(parse_candidates("vdit,radial", 0.25, (1.0,)))
    assert not have_one_density(parse_candidates("radial", 0.25))
    assert [c.method.density for c in parse_candidates("moa(alpha=2.0)", 0.25, (1.0,))] == [None, 0.25]


@pytest.mark.parametrize(
    "name, words",
    [
        ("nope", "no method"),
        ("rettention", "single calls"),
        ("cached(rettention)", "single calls"),
        ("svg2", "share a launch"),
        ("pooled(pbs)", "share a launch"),
        ("radial,svg,sol,asa,vdit,sparge,subblock,window,xattention,adaspa,sink", "letters"),
    ],
)
def test_bad_candidate_raises(name, words):
    with pytest.raises(ValueError, match=words):
        parse_candidates(name, 0.2)


def test_spread_without_a_density_below_1_raises():
    with pytest.raises(ValueError, match="spread must be positive multiples of the density"):
        parse_candidates("radial", 0.2, (5.0,))


def test_measurement_keeps_the_pipeline_dense_and_restores_it():
    tiny = ALL["wan"]()
    generate = lambda: torch.as_tensor(tiny.pipe(**tiny.kwargs()).frames)
    before, during = generate(), []
    prepare(tiny.pipe)
    candidates = [Candidate("dense", Radial(density=1.0)), Candidate("radial", Radial(density=0.3))]
    measurements = measure_candidates(
        tiny.pipe, lambda: during.append(generate()), candidates, Schedule(dense_steps=0), block=16
    )
    assert torch.allclose(during[0], before, atol=1e-4) and torch.equal(generate(), before)
    error, density = measurements.error, measurements.density
    assert error.shape == density.shape == measurements.seconds.shape == (2, 2, 2)
    assert (error[0] < 1e-8).all() and (error[1] > 1e-4).all() and (density[0] == 1).all()
    assert len(measurements.grids) == 1 and measurements.steps


def test_error_excludes_padding():
    """Large values in the padding of one batch item do not change the error."""
    q, k, v = torch.randn(3, 2, 2, 96, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    site, method, errors = Site(Grid(6, 4, 4), 16), Radial(density=0.4), []
    for scale in (1, 100):
        inputs = [x.clone() for x in (q, k, v)]
        for x in inputs:
            x[1, :, 80:] *= scale
        dense_plan = Plan.dense(96, 16).with_lengths(torch.tensor([96, 80]))
        dense = AttentionOutput(*inputs, dense_plan, None, *reference.attend(*inputs, dense_plan), dense=None)
        plan = method.plan(*inputs[:3], site, {}).with_lengths(dense_plan.lengths)
        errors.append(squared_error(method, dense, plan, reference.attend, site, {}))
    assert errors[0].dtype == torch.float64 and (errors[0] > 1e-4).all()
    torch.testing.assert_close(*errors)


def test_measured_steps_are_sparse():
    assert measured_steps(Schedule(dense_steps=2), 12, 3) == [2, 6, 11]
    assert measured_steps(Schedule(dense_steps=2), None, 3) == [2, 2, 2]
    for schedule in (Schedule(dense_steps=4), Schedule(dense_steps=1.0)):
        with pytest.raises(ValueError, match="all 4 steps dense"):
            measured_steps(schedule, 4, 3)
