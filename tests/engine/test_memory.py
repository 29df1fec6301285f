"""The memory and plans of a run: kept per site, dropped when a generation ends, fails or is interrupted."""

from __future__ import annotations

import pytest

import dit_sparse as ds
from sparse_pipelines import (
    PLAN_PER_BRANCH,
    RunningMean,
    cached_pipeline,
    calls_per_step,
    enable_sparse,
    for_pipelines,
    generate,
    generate_sparse,
    intercepted_modules,
    make_variant,
)

PLAN_EVERY_SECOND_STEP = ds.Schedule(dense_steps=1, replan_interval=2, per_branch=True)


@for_pipelines("wan", "wan22", "hunyuan_video", "cogvideox", "mochi", "ltx")
def test_memory_is_kept_per_site_and_dropped_after_the_generation(stock):
    method = RunningMean()
    with enable_sparse(stock, method, density=0.3, schedule=PLAN_PER_BRANCH) as run:
        first, second = generate(stock), generate(stock)
        assert not run._dispatcher._plans._memory and not run._dispatcher._plans._cache
    assert first.equal(second)
    for site, steps in method.log:
        begin = 2 if "transformer_2" in site.branch else 1
        assert steps == list(range(begin, site.step)), site
    assert len(method.log) == 2 * 3 * calls_per_step(stock)


@pytest.mark.parametrize("step", [0, 1, 2])
@for_pipelines("wan", "wan22", "hunyuan_video", "mochi", "ltx")
def test_failed_generation_does_not_affect_the_next(stock, step):
    def fail(pipe, now, timestep, kwargs):
        if now == step:
            raise KeyboardInterrupt
        return kwargs

    schedule = ds.Schedule(dense_steps=0, replan_interval=2)
    expected = generate_sparse(stock, RunningMean(), schedule=schedule, dense_steps=0)
    method = RunningMean()
    with enable_sparse(stock, method, density=0.3, schedule=schedule, dense_steps=0):
        with pytest.raises(KeyboardInterrupt):
            generate(stock, seed=1, callback_on_step_end=fail)
        method.log.clear()
        assert generate(stock).equal(expected)
    assert method.log[0][1] == []


def test_failure_in_the_first_step_without_cache_context():
    def fail(pipe, now, timestep, kwargs):
        raise KeyboardInterrupt

    stock, method = make_variant("WanVideoToVideoPipeline"), RunningMean()
    with enable_sparse(stock, method, density=0.3, dense_steps=0, schedule=PLAN_PER_BRANCH):
        with pytest.raises(KeyboardInterrupt):
            generate(stock, callback_on_step_end=fail)
        method.log.clear()
        generate(stock)
    assert {site.branch for site, _ in method.log} == {"transformer call 0 0", "transformer call 1 0"}
    assert all(steps == list(range(site.step)) for site, steps in method.log)


def test_interrupted_generation_does_not_affect_the_next():
    stock = cached_pipeline("wan")

    def stop(pipe, now, timestep, kwargs):
        pipe._interrupt = True
        return kwargs

    expected = generate_sparse(stock, RunningMean(), dense_steps=0)
    with enable_sparse(stock, RunningMean(), density=0.3, dense_steps=0) as run:
        generate(stock, seed=1, callback_on_step_end=stop)
        assert run.report().sparse_calls == calls_per_step(stock)
        assert generate(stock).equal(expected)


@pytest.mark.parametrize("call", [0, 1, 3])
@for_pipelines("wan", "cogvideox")
def test_failed_transformer_call_does_not_affect_the_next_generation(stock, call):
    calls = iter(range(100))

    def fail(module, args):
        if next(calls) == call:
            raise KeyboardInterrupt

    expected = generate_sparse(stock, RunningMean(), dense_steps=0)
    with enable_sparse(stock):
        module = intercepted_modules(stock)[-1]
    with enable_sparse(stock, RunningMean(), density=0.3, dense_steps=0):
        hook = module.register_forward_pre_hook(fail)
        try:
            with pytest.raises(KeyboardInterrupt):
                generate(stock, seed=1)
        finally:
            hook.remove()
        assert generate(stock).equal(expected)


@for_pipelines("wan", "cogvideox", "mochi")
def test_plans_are_kept_for_the_replan_interval(stock):
    """With equal text lengths, both batch items of Mochi have the same grid, but plans of their own."""
    plans = {}
    with enable_sparse(stock, RunningMean(), density=0.3, schedule=PLAN_EVERY_SECOND_STEP) as run:
        run.observe(lambda site, q, k, plan: plans.setdefault((site.layer, site.branch), []).append(plan.index))
        generate(stock, lengths=(9,)) if stock.name == "mochi" else generate(stock)
    assert len(plans) == calls_per_step(stock)
    for first, second, third in plans.values():
        assert first is second and first is not third
    assert len({id(indices[0]) for indices in plans.values()}) == len(plans)
