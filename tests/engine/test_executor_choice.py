"""What computes a call: the choices of the executor "auto" in sparse and dense steps, by costs set here."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from torch import Tensor

import dit_sparse as ds
from dit_sparse.kernels.calibration import CostModel
from dit_sparse.kernels.pick import Choice
from sparse_pipelines import (
    STEPS,
    RunningMean,
    assert_near,
    cached_pipeline,
    calls_per_step,
    count_layers,
    enable_sparse,
    generate,
    generate_dense,
)


@pytest.mark.parametrize("executor", ["gather", "auto"])
def test_short_sequences_stay_dense(stock, executor, executor_costs):
    plain = generate_dense(stock.name)
    with enable_sparse(stock, density=0.3, min_tokens=10_000, executor=executor) as run:
        assert generate(stock).equal(plain)
    report = run.report()
    reason = "fewer than 10000 tokens"
    assert report.dense_calls == {"the schedule": calls_per_step(stock), reason: 3 * calls_per_step(stock)}
    assert (report.sparse_calls, report.density_achieved, report.density_run) == (0, None, 1.0)
    assert reason in str(report)


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_auto_stays_dense_where_sdpa_is_faster(name, dynamic, executor_costs):
    """With ``min_tokens=0`` the costs do not matter."""
    stock, method, plain = cached_pipeline(name), RunningMean() if dynamic else "radial", generate_dense(name)
    executor_costs |= {"dense": CostModel(0.0, 0.0, 1e-9), "default": CostModel(1.0, 0.0, 1e-9)}
    settings = dict(dense_steps=0, block=16)
    with ds.enable(stock.pipe, method, **settings) as run:
        assert generate(stock).equal(plain)
    report, reason = run.report(), "dense attention is faster, as measured"
    assert report.sparse_calls == 0 and report.dense_calls == {reason: STEPS * calls_per_step(stock)}
    assert reason in str(report) and all(choice.startswith("dense: lowest estimated cost") for choice in report.choices)
    if dynamic:
        planned = [(site.layer, site.branch) for site, _ in method.log]
        assert 0 < len(planned) == len(set(planned)) <= 2 * count_layers(stock), "plans are made in one step only"
    with ds.enable(stock.pipe, method, min_tokens=0, **settings) as run:
        generate(stock)
    assert run.report().dense_calls == {}
    executor_costs["dense"] = CostModel(100.0, 0.0, 1e-9)
    with ds.enable(stock.pipe, method, **settings) as run:
        generate(stock)
    assert run.report().dense_calls == {} and all(name in {"cpu", "gather"} for name in run.report().executors)


@dataclass(frozen=True, kw_only=True)
class VaryingDensity(ds.Method):
    """Random blocks at the last of ``densities``."""

    densities: list = field(default_factory=list, compare=False)

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: ds.Site, memory: dict) -> ds.Plan:
        return ds.methods.method("random_blocks", density=self.densities[-1]).plan(q, k, k, site, memory)


def test_auto_does_not_depend_on_the_previous_clip(executor_costs):
    stock, method = cached_pipeline("wan"), VaryingDensity()
    seconds_per_pair = {"dense": 0.7, "gather": 1.0, "cpu": 2.0}
    executor_costs |= {name: CostModel(0.0, 0.0, seconds) for name, seconds in seconds_per_pair.items()}
    with ds.enable(stock.pipe, method, dense_steps=0, block=16) as run:
        for density, dense_clips, sparse_clips in ((0.9, 1, 0), (0.1, 1, 1), (0.9, 2, 1)):
            method.densities.append(density)
            generate(stock)
            assert sum(run.report().dense_calls.values()) == dense_clips * STEPS * calls_per_step(stock)
            assert run.report().sparse_calls == sparse_clips * STEPS * calls_per_step(stock)


@pytest.mark.parametrize(
    "method, clips",
    [("radial", 1), (RunningMean(density=0.3), 1), (ds.methods.method("radial"), 1), (RunningMean(), 2)],
    ids=repr,
)
def test_auto_chooses_once_per_layer_and_again_if_density_varies(method, clips, monkeypatch):
    stock, choices = cached_pipeline("wan"), []
    pick = lambda *args, **kwargs: choices.append(args) or Choice("gather", "a test")
    monkeypatch.setattr("dit_sparse.engine.executor_choice.pick", pick)
    with ds.enable(stock.pipe, method, dense_steps=0, block=16):
        for _ in range(2):
            generate(stock)
    assert len(choices) == clips * count_layers(stock)


ALL_DENSE = dict(executor="auto", dense_steps=STEPS, block=16)


def test_faster_executor_computes_dense_steps(stock, executor_costs):
    plain = generate_dense(stock.name)
    with enable_sparse(stock, **ALL_DENSE) as run:
        assert_near(generate(stock), plain, 1e-4)
    ((reason, calls),) = run.report().dense_calls.items()
    assert reason.startswith("the schedule, by the executor ") and calls == STEPS * calls_per_step(stock)
    assert reason.split()[-1] in {"cpu", "gather"} and run.report().sparse_calls == 0
    assert run.report().density_run == 1.0


@pytest.mark.parametrize(
    "method, settings", [("dense", {}), ("radial", {"executor": "gather"}), ("radial", {"executor": "cpu"})]
)
def test_sdpa_computes_dense_steps_of_the_baseline_and_of_named_executors(method, settings, executor_costs):
    """The baseline is SDPA; a named executor computes only the plans of the method."""
    stock, plain = cached_pipeline("wan"), generate_dense("wan")
    with enable_sparse(stock, method, **ALL_DENSE | settings) as run:
        assert generate(stock).equal(plain)
    assert run.report().dense_calls == {"the schedule": STEPS * calls_per_step(stock)}


def test_sdpa_computes_dense_steps_if_no_executor_is_faster(executor_costs):
    stock, plain = cached_pipeline("hunyuan_video"), generate_dense("hunyuan_video")
    executor_costs |= {"dense": CostModel(0.0, 0.0, 1e-9), "default": CostModel(0.0, 0.0, 1.1e-9)}
    with enable_sparse(stock, **ALL_DENSE) as run:
        assert_near(generate(stock), plain)  # without padding, which changes the rounding
    assert run.report().dense_calls == {"the schedule": STEPS * calls_per_step(stock)}
