"""Classifier-free guidance: how its branches share plans."""

from __future__ import annotations

import pytest
import torch

import dit_sparse as ds
import tiny_pipelines as tiny
from dit_sparse.methods.corrections.rettention import Rettention
from sparse_pipelines import (
    PLAN_EVERY_STEP,
    PLAN_PER_BRANCH,
    STEPS,
    RunningMean,
    assert_near,
    cached_pipeline,
    calls_per_step,
    count_layers,
    enable_sparse,
    generate,
    generate_dense,
    generate_sparse,
    make_variant,
)


def plans_of(stock, schedule=PLAN_EVERY_STEP, other=None) -> tuple[list, dict]:
    """Return the sites at which a method made plans, and the plans of all calls by step, layer and branch."""
    method, plans = RunningMean(), {}
    with enable_sparse(stock, method, density=0.3, schedule=schedule) as run:
        run.observe(lambda site, q, k, plan: plans.setdefault((site.step, site.layer, site.branch), plan))
        generate(stock, **other or {})
    return [site for site, _ in method.log], plans


@pytest.mark.parametrize("name", ["wan", "wan22", "wan_i2v", "wan_vace", "WanVideoToVideoPipeline"])
def test_conditional_branch_plans_for_both(name):
    """The branches are separate calls, with or without a cache context."""
    stock = make_variant(name) if name.endswith("Pipeline") else cached_pipeline(name)
    planned, plans = plans_of(stock)
    planning_branches = {site.branch.partition(" ")[2] for site in planned}
    assert planning_branches in ({"cond 0"}, {"call 0 0"})
    shared = 0
    for (step, layer, branch), plan in plans.items():
        planning_branch = branch.replace("uncond", "cond").replace("call 1", "call 0")
        shared += planning_branch != branch
        assert plan.index is plans[step, layer, planning_branch].index
    assert shared == len(planned) == len(plans) / 2


@pytest.mark.parametrize("name, first", [("hunyuan_video", "cond"), ("HunyuanVideoImageToVideoPipeline", "call 0")])
def test_hunyuan_video_with_true_guidance_shares_plans(name, first):
    """Its guidance_scale is an embedding in one call; true_cfg_scale makes two calls."""
    stock = cached_pipeline(name) if name in tiny.ALL else make_variant(name)
    planned, plans = plans_of(stock, other=dict(true_cfg_scale=4.0))
    assert {site.branch for site in planned} == {f"transformer {first} 0"} and len(plans) == 2 * len(planned)


@pytest.mark.parametrize("name", ["cogvideox", "cogvideox15", "ltx"])
def test_conditional_half_of_a_batch_plans_for_both(name):
    stock = cached_pipeline(name)
    shared, separate = (plans_of(stock, schedule)[1] for schedule in (PLAN_EVERY_STEP, PLAN_PER_BRANCH))
    for site, plan in shared.items():
        assert len(plan.index) == 1
        if site[:2] == (1, 0):  # the latents still equal those of the dense steps
            assert plan.block_mask()[0].equal(separate[site].block_mask()[1])
    assert any(not plan.block_mask()[0].equal(plan.block_mask()[1]) for plan in separate.values())


def test_mochi_shares_plans_between_prompts_of_equal_length():
    """It attends one batch item at a time; prompts of different lengths have different grids."""
    stock = cached_pipeline("mochi")
    planned, plans = plans_of(stock, other=dict(lengths=(9, 9)))
    assert {site.branch[-1] for site in planned} == {"0", "1"} and len(plans) == 2 * len(planned)
    for (step, layer, branch), plan in plans.items():
        prompt = int(branch[-1]) % 2
        assert plan is plans[step, layer, f"transformer cond_uncond {prompt}"]
    planned, plans = plans_of(stock)
    assert len(plans) == len(planned) == (STEPS - 1) * calls_per_step(stock)


@pytest.mark.parametrize("name", ["wan", "cogvideox", "ltx"])
def test_two_prompts_give_the_results_of_single_prompts(name):
    stock = cached_pipeline(name)
    both, seeds = stock.kwargs(lengths=(13, 5)), lambda: [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    prompt = lambda i: {key: x[i : i + 1] for key, x in both.items() if "prompt" in key}
    with enable_sparse(stock, RunningMean(), density=0.3, schedule=PLAN_EVERY_STEP):
        together = generate(stock, lengths=(13, 5), generator=seeds())
        alone = [generate(stock, **prompt(i), generator=seeds()[i]) for i in range(2)]
    assert_near(together, torch.cat(alone), 1e-4)


@pytest.mark.parametrize("name", ["cogvideox", "ltx", "mochi"])
def test_batch_without_guidance_has_a_plan_per_prompt(name):
    """The cache context is that of a batch with guidance."""
    stock = cached_pipeline(name)
    planned, plans = plans_of(stock, other=dict(lengths=(9, 9), guidance_scale=1.0))
    assert len(plans) == len(planned) == (STEPS - 1) * count_layers(stock) * (2 if name == "mochi" else 1)
    assert all(len(plan.index) == (1 if name == "mochi" else 2) for plan in plans.values())


@pytest.mark.parametrize("name", ["wan", "cogvideox", "mochi"])
def test_per_branch_makes_a_plan_for_each_branch(name):
    stock = cached_pipeline(name)
    planned, plans = plans_of(stock, PLAN_PER_BRANCH)
    assert len(planned) == len(plans) == (STEPS - 1) * calls_per_step(stock)
    assert all(len(plan.index) == (2 if name == "cogvideox" else 1) for plan in plans.values())
    shared = generate_sparse(stock, RunningMean(), schedule=PLAN_EVERY_STEP)
    assert shared.equal(generate_sparse(stock, RunningMean(), schedule=PLAN_PER_BRANCH)) == (name == "mochi")


def test_kept_plan_is_used_by_both_branches():
    stock = cached_pipeline("wan")
    planned, plans = plans_of(stock, ds.Schedule(dense_steps=1, replan_interval=2))
    assert [site.step for site in planned] == [1] * count_layers(stock) + [3] * count_layers(stock)
    assert len(plans) == 3 * calls_per_step(stock)
    for (step, layer, _), plan in plans.items():
        assert plan.index is plans[1 if step < 3 else 3, layer, "transformer cond 0"].index


@pytest.mark.parametrize("name", ["cogvideox", "ltx"])
def test_clusters_of_one_half_are_used_by_both(name):
    assert_near(generate_sparse(cached_pipeline(name), "svg2", density=1.0), generate_dense(name))


def test_other_cache_contexts_do_not_share_plans():
    stock, method = cached_pipeline("wan"), RunningMean()
    latent, text = torch.randn(1, 16, 5, 10, 14), torch.randn(2, 1, 24, 32)
    with torch.no_grad(), enable_sparse(stock.pipe.transformer, method, density=0.3, dense_steps=0):
        for name, prompt in zip(("clip 0", "clip 1"), text, strict=True):
            with stock.pipe.transformer.cache_context(name):
                stock.pipe.transformer(latent, torch.tensor([500]), prompt)
    assert len(method.log) == 2 * count_layers(stock)


def test_guidance_is_read_once_per_generation():
    """The scale of CogVideoX's dynamic guidance exceeds 1 after the first step."""
    stock = cached_pipeline("cogvideox")
    other = dict(lengths=(9, 9), guidance_scale=1.0, use_dynamic_cfg=True)
    _, plans = plans_of(stock, PLAN_EVERY_STEP, other)
    assert {len(plan.index) for plan in plans.values()} == {2}


def test_two_prompts_with_equal_noise_do_not_share_plans():
    equal_noise = [torch.Generator().manual_seed(3) for _ in range(2)]
    _, plans = plans_of(cached_pipeline("ltx"), other=dict(lengths=(9, 5), guidance_scale=1.0, generator=equal_noise))
    assert {len(plan.index) for plan in plans.values()} == {2}


def test_rettention_in_a_guided_pipeline():
    """Only the refreshes are dense: steps 1 and 3 of four, in both branches."""
    stock = cached_pipeline("wan")
    method = Rettention(inner=RunningMean(density=0.3), refresh_interval=2)
    with enable_sparse(stock, method, schedule=PLAN_EVERY_STEP) as run:
        generate(stock)
    assert run.report().sparse_calls == 3 * calls_per_step(stock)
    with enable_sparse(stock, RunningMean(), density=0.3, schedule=PLAN_EVERY_STEP) as inner:
        generate(stock)
    density = inner.report().density_achieved
    assert run.report().density_achieved == pytest.approx(density + 2 / 3, abs=0.02)
