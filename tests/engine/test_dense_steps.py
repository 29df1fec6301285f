"""What dense steps tell a method, and the density of the sparse steps that follow, in pipelines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

import dit_sparse as ds
from dit_sparse.kernels.executors import reference
from dit_sparse.method import AttentionOutput
from dit_sparse.methods.patterns.window import Window
from sparse_pipelines import (
    STEPS,
    cached_pipeline,
    count_layers,
    enable_sparse,
    for_pipelines,
    generate,
    generate_dense,
)


@dataclass(frozen=True, kw_only=True)
class DenseObserver(Window):
    """A window that records what it observes in dense steps, and returns it in place of the first sparse output."""

    observes_dense: ClassVar[bool] = True
    seen: list[tuple[ds.Site, AttentionOutput]] = field(default_factory=list, compare=False)

    def observe_dense(self, result, site, memory):
        self.seen.append((site, result))
        memory[site.branch] = result.dense()[0]

    def correct(self, result, site, memory):
        return memory.get(site.branch, result.out), result.lse


@for_pipelines("wan", "hunyuan_video", "cogvideox", "mochi", "ltx")
def test_calls_of_the_last_dense_step_are_observed(stock):
    """Once for each layer and branch; both branches in one batch are one call."""
    method, sparse = DenseObserver(density=0.3), set()
    with enable_sparse(stock, method, dense_steps=2) as run:
        run.observe(lambda site, q, k, plan: sparse.add((site.layer, site.branch)))
        generate(stock)
    assert {site.step for site, _ in method.seen} == {1}
    observed = [(site.layer, site.branch) for site, _ in method.seen]
    assert len(observed) == len(set(observed)) and set(observed) == sparse
    for _, result in method.seen:
        dense, exact = result.dense()[0], reference.attend(result.q, result.k, result.v, result.plan.full())[0]
        lengths = [result.plan.tokens] * len(dense) if result.plan.lengths is None else result.plan.lengths.tolist()
        for item, length in enumerate(lengths):
            torch.testing.assert_close(dense[item, :, :length], exact[item, :, :length], rtol=0, atol=2e-5)
        sparse_out = reference.attend(result.q, result.k, result.v, result.plan)[0]
        torch.testing.assert_close(result.out, sparse_out, rtol=0, atol=2e-5)


def test_observations_reach_the_memory_of_the_sparse_calls():
    """The method replaces every sparse output by the dense one of its layer and branch."""
    stock = cached_pipeline("wan")
    method = DenseObserver(density=0.3)
    with enable_sparse(stock, method, dense_steps=STEPS - 1) as run:
        video = generate(stock)
        report = run.report()
    assert video.isfinite().all()
    layers, achieved = count_layers(stock), report.density_achieved
    assert len(method.seen) == 2 * layers and report.sparse_calls == 2 * layers
    assert report.density_run == pytest.approx((STEPS - 1 + 2 * achieved) / STEPS), "the observed plan counts"


@pytest.mark.parametrize("settings", [{"dense_steps": 0}, {"dense_layers": 1.0}, {"min_tokens": 10**6}])
def test_nothing_is_observed_without_a_dense_step_before_sparse_ones(settings):
    method = DenseObserver(density=0.3)
    with enable_sparse(cached_pipeline("wan"), method, **settings):
        generate(cached_pipeline("wan"))
    assert not method.seen


def test_methods_are_not_shown_dense_steps_unless_they_ask(monkeypatch):
    monkeypatch.setattr(Window, "observe_dense", lambda *arguments: pytest.fail("a window does not observe"))
    with enable_sparse(cached_pipeline("wan"), "window", density=0.3):
        generate(cached_pipeline("wan"))


@for_pipelines("wan", "cogvideox")
def test_the_density_ramp_of_a_run(stock):
    densities: dict[int, set[float]] = {}
    with enable_sparse(stock, "window", density=0.4, density_ramp=(1.5, 0.5)) as run:
        run.observe(lambda site, q, k, plan: densities.setdefault(site.step, set()).add(plan.density))
        generate(stock)
        report = run.report()
    assert report.density_by_step == pytest.approx({1: 0.6, 2: 0.4, 3: 0.2})
    for step, asked in report.density_by_step.items():
        least = 0.25 if stock.side else 0.0
        assert densities[step] and all(abs(one - max(asked, least)) < 0.1 for one in densities[step])
    assert "density by step  0.6 from step 1, 0.4 from step 2, 0.2 from step 3" in str(report)


def test_runs_of_one_density_report_no_densities_by_step():
    with enable_sparse(cached_pipeline("wan"), density=0.3) as run:
        generate(cached_pipeline("wan"))
    assert run.report().density_by_step == {} and "by step" not in str(run.report())


def test_a_ramp_needs_a_density():
    with pytest.raises(ValueError, match="density_ramp needs a density"):
        ds.SparseAttnProcessor("radial(decay=0.2)", density_ramp=(1.3, 0.6))
    assert ds.SparseAttnProcessor("radial", density_ramp=[1.3, 0.6]).settings.schedule.density_ramp == (1.3, 0.6)


# --- the residual of routed attention


@for_pipelines("wan", "cogvideox", "hunyuan_video")
def test_density_1_equals_dense_in_pipelines(stock):
    dense = generate_dense(stock.name)
    with enable_sparse(stock, "routed", density=1.0, schedule=ds.Schedule()):
        torch.testing.assert_close(generate(stock), dense, rtol=0, atol=2e-5)


@for_pipelines("wan", "cogvideox", "mochi")
def test_the_residual_is_dropped_with_the_second_plan(stock):
    """Its memory is free from then on."""
    held = []
    with enable_sparse(stock, "routed", density=0.3, schedule=ds.Schedule(replan_interval=1)) as run:
        memory = run._dispatcher._plans._memory
        run.observe(lambda site, *_: held.append((site.step, sum("residual" in one for one in memory.values()))))
        assert generate(stock).isfinite().all()
    sparse_steps = sorted({step for step, _ in held})
    assert max(n for step, n in held if step == sparse_steps[0]) > 0
    assert held[-1][1] == 0
