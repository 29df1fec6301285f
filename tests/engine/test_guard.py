"""The quality guard: measured attention mass, and layers that compute more pairs."""

from __future__ import annotations

import pytest
import torch

import dit_sparse as ds
from dit_sparse.engine.forward import AttentionCall
from dit_sparse.engine.guard import DENSE_LEVEL, QualityGuard, retained_mass
from dit_sparse.engine.report import RunCounters
from dit_sparse.methods import method
from dit_sparse.plan import Plan
from sparse_pipelines import RunningMean, assert_near, cached_pipeline, enable_sparse, generate, generate_dense

GRID = ds.Grid(4, 8, 8, before=5, after=20)


def call_of(q: torch.Tensor, k: torch.Tensor) -> AttentionCall:
    return AttentionCall(q, k, k, None, False, 0.0, None, lambda: q)


@pytest.mark.parametrize("name", ["radial", "svg2", "asa"])
def test_retained_mass_is_that_of_all_queries(name, monkeypatch):
    """With all video rows sampled it is the mean over rows and heads; padding has no weight."""
    monkeypatch.setattr("dit_sparse.engine.guard.TOKENS_PER_ROW", 1)
    monkeypatch.setattr("dit_sparse.engine.guard.MAX_ROWS", GRID.video)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, GRID.tokens, 16, generator=generator) for heads in (4, 2))
    site, lengths = ds.Site(GRID, block=16), torch.tensor([GRID.tokens, GRID.tokens - 7])
    plan = method(name, density=0.4).plan(q, k, k, site, {}).with_lengths(lengths)
    k[1, :, -7:] = torch.nan
    weights = (q.double() @ k.double().nan_to_num().repeat_interleave(2, 1).mT / 4).masked_fill(
        (torch.arange(GRID.tokens) >= lengths[:, None])[:, None, None], -torch.inf
    )
    rows = slice(GRID.before, GRID.before + GRID.video)
    kept = weights.softmax(-1)[:, :, rows] * plan.token_mask(torch.arange(GRID.tokens))[:, :, rows]
    assert float(retained_mass(call_of(q, k), site, plan)) == pytest.approx(float(kept.sum(-1).mean()), abs=1e-5)
    assert float(retained_mass(call_of(q, k.nan_to_num()), site, Plan.dense(GRID.tokens, 16))) == pytest.approx(1)


def test_a_weak_layer_is_raised_and_then_dense():
    counters, site = RunCounters(), ds.Site(GRID, component="transformer", layer=1)
    guard = QualityGuard(0.9, True, counters)
    densities = []
    for _ in range(DENSE_LEVEL + 1):
        densities.append(guard.density(site, 0.2))
        guard._measured["transformer", 1].append(torch.tensor(0.5))
        guard._measured["transformer", 0].append(torch.tensor(0.95))
        guard.begin_forward()
    assert densities[:DENSE_LEVEL] == [0.2, pytest.approx(0.6), pytest.approx(0.8)]
    assert guard.dense_reason(site) and not guard.dense_reason(ds.Site(GRID, component="transformer", layer=0))
    assert counters.guarded_layers["transformer", 1] == {"least_mass": 0.5, "raised": DENSE_LEVEL}
    guard.end_generation()
    assert guard.density(site, 0.2) == 0.2 and not guard.dense_reason(site)


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_a_strict_guard_makes_a_run_denser_and_is_reported(name):
    stock = cached_pipeline(name)
    with enable_sparse(stock, density=0.3, dense_steps=0) as run:
        generate(stock)
    loose = run.report()
    with enable_sparse(stock, density=0.3, dense_steps=0, guard=0.999) as run:
        guarded = generate(stock)
    report = run.report()
    assert loose.guard == {} and report.density_run > loose.density_run + 0.1
    assert all(layer["raised"] >= 1 and 0 < layer["least_mass"] < 0.999 for layer in report.guard.values())
    assert report.density_note == "the quality guard raised it" and "quality guard" in str(report)
    with enable_sparse(stock, density=0.3, dense_steps=0, guard=0.999):
        generate(stock, seed=1)
        assert_near(generate(stock), guarded)


def test_a_guard_that_is_met_changes_nothing():
    stock = cached_pipeline("wan")
    with enable_sparse(stock, density=0.3) as run:
        plain = generate(stock)
    with enable_sparse(stock, density=0.3, guard=0.01) as run:
        assert generate(stock).equal(plain)
    assert all(layer["raised"] == 0 for layer in run.report().guard.values())


def test_a_method_without_density_becomes_dense():
    stock = cached_pipeline("wan")
    with enable_sparse(stock, RunningMean(budget=ds.Top(0.2)), density=None, guard=0.999) as run:
        generate(stock)
    assert run.report().dense_calls["the guard"] > 0


@pytest.mark.parametrize("value", [0, 1, -0.1, "0.9", True, float("nan")])
def test_other_limits_are_refused(value):
    with pytest.raises(ValueError, match="guard"):
        ds.SparseAttnProcessor("radial", guard=value)


def test_the_guard_never_runs_in_a_dense_run():
    stock, dense = cached_pipeline("wan"), generate_dense("wan")
    with enable_sparse(stock, "dense", guard=0.9) as run:
        assert generate(stock).equal(dense)
    assert run.report().guard == {}
