"""The plans of a run, and how the branches of guidance share them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dit_sparse as ds
import tiny_pipelines as tiny
from attention_cases import grids
from dit_sparse.clusters import ClusterPlan, Clusters
from dit_sparse.engine.plans import Plans
from dit_sparse.kernels.executors import reference
from dit_sparse.method import AttentionOutput, Method
from dit_sparse.methods import method
from dit_sparse.methods.rettention import Rettention
from dit_sparse.plan import Plan
from sparse_pipelines import (
    APART,
    STEPS,
    Drifting,
    built,
    calls_per_step,
    dense_latents,
    latents,
    layers,
    near,
    sparse,
    sparse_latents,
    variant,
)

EVERY = ds.Schedule(dense_steps=1, replan_interval=1)


def plans_of(stock, schedule=EVERY, other=None) -> tuple[list, dict]:
    """Sites where a method was asked, and the plans that were computed, by step, layer and branch."""
    asked, plans = Drifting(), {}
    with sparse(stock, asked, density=0.3, schedule=schedule) as run:
        run.observe(lambda site, q, k, plan: plans.setdefault((site.step, site.layer, site.branch), plan))
        latents(stock, **other or {})
    return [site for site, _ in asked.log], plans


# --- who plans for whom


@pytest.mark.parametrize("name", ["wan", "wan22", "wan_i2v", "wan_vace", "WanVideoToVideoPipeline"])
def test_the_branch_of_the_prompt_plans_for_both(name):
    """Called one after the other, by name or without one."""
    stock = variant(name) if name.endswith("Pipeline") else built(name)
    asked, plans = plans_of(stock)
    first, second = dict.fromkeys(site.branch.split()[1] + site.branch.split()[2] for site in asked), []
    assert len(first) == 1 and first.keys() <= {"cond0", "call0"}
    for (step, layer, branch), plan in plans.items():
        leader = branch.replace("uncond", "cond").replace("call 1", "call 0")
        second += [branch] * (leader != branch)
        assert plan.index is plans[step, layer, leader].index
    assert len(second) == len(asked) == len(plans) / 2


@pytest.mark.parametrize("name, first", [("hunyuan_video", "cond"), ("HunyuanVideoImageToVideoPipeline", "call 0")])
def test_hunyuan_video_with_guidance_shares_too(name, first):
    """Its guidance_scale is embedded, one call; true_cfg_scale makes two."""
    stock = built(name) if name in tiny.ALL else variant(name)
    asked, plans = plans_of(stock, other=dict(true_cfg_scale=4.0))
    assert {site.branch for site in asked} == {f"transformer {first} 0"} and len(plans) == 2 * len(asked)


@pytest.mark.parametrize("name", ["cogvideox", "cogvideox15", "ltx"])
def test_of_a_batch_with_both_branches_the_second_half_plans(name):
    stock = built(name)
    shared, apart = (plans_of(stock, schedule)[1] for schedule in (EVERY, APART))
    for place, plan in shared.items():
        assert len(plan.index) == 1
        if place[:2] == (1, 0):  # before sparse attention has made a difference
            assert plan.block_mask()[0].equal(apart[place].block_mask()[1])
    assert any(not plan.block_mask()[0].equal(plan.block_mask()[1]) for plan in apart.values())


def test_mochi_shares_where_both_prompts_are_of_one_length():
    """It attends one item of its batch after the other; prompts of other lengths are other grids."""
    stock = built("mochi")
    asked, plans = plans_of(stock, other=dict(lengths=(9, 9)))
    assert {site.branch[-1] for site in asked} == {"0", "1"} and len(plans) == 2 * len(asked)
    for (step, layer, branch), plan in plans.items():
        turn = int(branch[-1]) % 2
        assert plan is plans[step, layer, f"transformer cond_uncond {turn}"]
    asked, plans = plans_of(stock)
    assert len(plans) == len(asked) == (STEPS - 1) * calls_per_step(stock)


@pytest.mark.parametrize("name", ["wan", "cogvideox", "ltx"])
def test_two_prompts_are_as_if_alone(name):
    stock = built(name)
    both, seeds = stock.kwargs(lengths=(13, 5)), lambda: [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    one = lambda i: {key: x[i : i + 1] for key, x in both.items() if "prompt" in key}
    with sparse(stock, Drifting(), density=0.3, schedule=EVERY):
        together = latents(stock, lengths=(13, 5), generator=seeds())
        alone = [latents(stock, **one(i), generator=seeds()[i]) for i in range(2)]
    near(together, torch.cat(alone), 1e-4)


@pytest.mark.parametrize("name", ["cogvideox", "ltx", "mochi"])
def test_without_guidance_a_batch_holds_two_prompts(name):
    """Under the same cache context as with guidance."""
    stock = built(name)
    asked, plans = plans_of(stock, other=dict(lengths=(9, 9), guidance_scale=1.0))
    assert len(plans) == len(asked) == (STEPS - 1) * layers(stock) * (2 if name == "mochi" else 1)
    assert all(len(plan.index) == (1 if name == "mochi" else 2) for plan in plans.values())


@pytest.mark.parametrize("name", ["wan", "cogvideox", "mochi"])
def test_per_branch_keeps_them_apart(name):
    stock = built(name)
    asked, plans = plans_of(stock, APART)
    assert len(asked) == len(plans) == (STEPS - 1) * calls_per_step(stock)
    assert all(len(plan.index) == (2 if name == "cogvideox" else 1) for plan in plans.values())
    shared = sparse_latents(stock, Drifting(), schedule=EVERY)
    assert shared.equal(sparse_latents(stock, Drifting(), schedule=APART)) == (name == "mochi")


def test_a_kept_plan_serves_both_branches():
    stock = built("wan")
    asked, plans = plans_of(stock, ds.Schedule(dense_steps=1, replan_interval=2))
    assert [site.step for site in asked] == [1] * layers(stock) + [3] * layers(stock)
    assert len(plans) == 3 * calls_per_step(stock)
    for (step, layer, _), plan in plans.items():
        assert plan.index is plans[1 if step < 3 else 3, layer, "transformer cond 0"].index


@pytest.mark.parametrize("name", ["cogvideox", "ltx"])
def test_clusters_of_one_half_serve_both(name):
    near(sparse_latents(built(name), "svg2", density=1.0), dense_latents(name))


def test_any_other_cache_context_is_no_branch_of_guidance():
    stock, asked = built("wan"), Drifting()
    latent, text = torch.randn(1, 16, 5, 10, 14), torch.randn(2, 1, 24, 32)
    with torch.no_grad(), sparse(stock.pipe.transformer, asked, density=0.3, dense_steps=0):
        for name, prompt in zip(("clip 0", "clip 1"), text, strict=True):
            with stock.pipe.transformer.cache_context(name):
                stock.pipe.transformer(latent, torch.tensor([500]), prompt)
    assert len(asked.log) == 2 * layers(stock)


def test_whether_a_pipeline_is_guided_is_asked_once_a_generation():
    """The scale of CogVideoX's dynamic guidance exceeds 1 after the first step, whatever was asked for."""
    stock = built("cogvideox")
    other = dict(lengths=(9, 9), guidance_scale=1.0, use_dynamic_cfg=True)
    _, plans = plans_of(stock, EVERY, other)
    assert {len(plan.index) for plan in plans.values()} == {2}


def test_two_prompts_from_one_noise_are_no_branches():
    one_noise = [torch.Generator().manual_seed(3) for _ in range(2)]
    _, plans = plans_of(built("ltx"), other=dict(lengths=(9, 5), guidance_scale=1.0, generator=one_noise))
    assert {len(plan.index) for plan in plans.values()} == {2}


def test_an_odd_batch_is_not_halved():
    q, asked = torch.zeros(3, 1, 8, 4), []
    method = SimpleNamespace(static=False, manages_own_plans=False, plan=lambda q, *_: asked.append(len(q)))
    Plans(method).plan(q, q, ds.Site(ds.Grid(1, 2, 4), both_branches=True))
    assert asked == [3]


def test_the_same_branch_again_in_one_step_is_another_part_of_the_video():
    asked = []

    class Asked(Method):
        def plan(self, q, k, site, memory):
            asked.append((float(q[0, 0, 0, 0]), memory.setdefault("seen", []).copy()))
            memory["seen"].append(site.step)

    plans = Plans(Asked())
    grid = ds.Grid(1, 1, 1)
    for value, branch, step in [(0, "a", 3), (1, "b", 3), (2, "a", 3), (3, "b", 3), (4, "b", 4), (5, "a", 4)]:
        q = torch.full((1, 1, 1, 1), float(value))
        plans.plan(q, q, ds.Site(grid, step=step, branch=branch, plan_group="ab"))
    assert asked == [(0, []), (2, [3]), (4, [3, 3])]


def test_what_a_method_makes_of_no_plan_is_kept_too():
    asked = []
    never = SimpleNamespace(static=False, manages_own_plans=False, plan=lambda *given: asked.append(given))
    plans, q = Plans(never), torch.zeros(2, 1, 1, 1)
    for due in (True, False):
        assert plans.plan(q, q, ds.Site(ds.Grid(1, 1, 1), both_branches=True, needs_plan=due)) is None
    assert len(asked) == 1 and len(asked[0][0]) == 1


# --- twice the batch


def random_plan(clusters: bool, batch: int, grid: ds.Grid, order: str) -> Plan | ClusterPlan:
    lead, tokens = (batch, 2), grid.tokens
    if clusters:
        sides = [Clusters.from_labels(torch.randint(0, 5, (*lead, tokens)), 5) for _ in range(2)]
        keep = torch.rand(*lead, 5, 5) < 0.5
        return ClusterPlan.from_mask(keep | torch.eye(5, dtype=torch.bool), *sides)
    places = torch.rand(*lead, tokens).argsort(-1)
    blocks = -(-tokens // 16)
    keep = (torch.rand(*lead, blocks, blocks) < 0.4) | torch.eye(blocks, dtype=torch.bool)
    return Plan.from_mask(keep, tokens, 16, {"own": places, "one": places[0, 0], "none": None}[order])


@given(
    st.booleans(),
    st.integers(1, 3),
    grids(4),
    st.sampled_from(["own", "one", "none"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_a_plan_for_twice_the_batch(clusters, batch, grid, order, padded, seed):
    torch.manual_seed(seed)
    plan = random_plan(clusters, batch, grid, order)
    if clusters:  # sizes that all items share, and orders of their own
        edges = torch.linspace(0, grid.tokens, 6).int()[None, None]
        plan = replace(plan, keys=replace(plan.keys, edges=edges))
    plan = plan.with_lengths(torch.randint(1, grid.tokens + 1, (batch,)) if padded else None)
    halves = torch.randn(2, 3, batch, 2, grid.tokens, 8)
    together = reference.attend(*torch.cat([*halves], 1), plan.repeat_batch())
    for i in range(2):
        for whole, half in zip(together, reference.attend(*halves[i], plan), strict=True):
            assert whole[i * batch : (i + 1) * batch].equal(half)


# --- corrections remember what each branch lacks


def corrected(what: Rettention, plans: Plans, q: Tensor, k: Tensor, v: Tensor, site: ds.Site) -> tuple[Tensor, Plan]:
    plan = plans.plan(q, k, site)
    dense = partial(reference.attend, q, k, v, plan.full())
    return what.correct(
        AttentionOutput(q, k, v, plan, None, *reference.attend(q, k, v, plan), dense), site, plans.memory(q, site)
    )[0], plan


@pytest.mark.parametrize("inner", ["window", "adaspa", "svg2"])
def test_rettention_keeps_the_residual_of_each_branch(inner):
    """With one plan for both. While q, k, v stay, each branch has its own dense output."""
    grid, what = ds.Grid(4, 5, 6), Rettention(inner=method(inner, density=0.3), ramp=0.0, every=3)
    plans = Plans(what)
    branches = {name: torch.randn(3, 1, 2, grid.tokens, 16) for name in ("cond", "uncond")}
    for step in range(2, 7):
        used = []
        for name, (q, k, v) in branches.items():
            out, plan = corrected(what, plans, q, k, v, ds.Site(grid, 16, step=step, branch=name, plan_group="both"))
            near(out, reference.attend(q, k, v, plan.full())[0])
            used.append(plan)
        assert used[0] is used[1]


def test_rettention_in_a_guided_pipeline():
    """Nothing but the refreshes is dense: steps 1 and 3 of four, in both branches."""
    stock = built("wan")
    what = Rettention(inner=Drifting(density=0.3), every=2)
    with sparse(stock, what, schedule=EVERY) as run:
        latents(stock)
    assert run.report().sparse_calls == 3 * calls_per_step(stock)
    kept = sparse(stock, Drifting(), density=0.3, schedule=EVERY)
    with kept:
        latents(stock)
    share = kept.report().density_achieved
    assert run.report().density_achieved == pytest.approx(share + 2 / 3, abs=0.02)
