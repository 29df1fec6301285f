"""The plan cache of a run, without a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dit_sparse as ds
from attention_cases import grids
from dit_sparse.clusters import ClusterPlan, Clusters
from dit_sparse.composition import PerHead
from dit_sparse.engine.plans import Plans
from dit_sparse.kernels.executors import reference
from dit_sparse.method import AttentionOutput, Method, shared_memory
from dit_sparse.methods import method
from dit_sparse.methods.corrections.rettention import Rettention
from dit_sparse.plan import Plan
from dit_sparse.scoring import pool
from sparse_pipelines import assert_near, cached_pipeline, count_layers, enable_sparse, generate


def recorder(record: Callable) -> Method:
    """Return a method that calls ``record`` with the arguments of plan(), and makes no plan."""
    return type("Recorder", (Method,), {"plan": lambda self, *arguments: record(*arguments)})()


def test_odd_batch_is_planned_whole():
    q, batches = torch.zeros(3, 1, 8, 4), []
    Plans(recorder(lambda q, *_: batches.append(len(q)))).plan(q, q, ds.Site(ds.Grid(1, 2, 4), both_branches=True))
    assert batches == [3]


def test_second_call_of_a_branch_in_a_step_gets_a_new_plan():
    """As in pipelines that denoise a long video in windows."""
    calls = []

    class Recorder(Method):
        def plan(self, q, k, v, site, memory):
            calls.append((float(q[0, 0, 0, 0]), memory.setdefault("steps", []).copy()))
            memory["steps"].append(site.step)

    plans = Plans(Recorder(), ds.Schedule(replan_interval=1))
    grid = ds.Grid(1, 1, 1)
    for value, branch, step in [(0, "a", 3), (1, "b", 3), (2, "a", 3), (3, "b", 3), (4, "b", 4), (5, "a", 4)]:
        q = torch.full((1, 1, 1, 1), float(value))
        plans.plan(q, q, ds.Site(grid, step=step, branch=branch, plan_group="ab"))
    assert calls == [(0, []), (2, [3]), (4, [3, 3])]


def test_absence_of_a_plan_is_cached():
    calls = []
    plans, q = Plans(recorder(lambda *arguments: calls.append(arguments))), torch.zeros(2, 1, 1, 1)
    for step in (0, 1):
        assert plans.plan(q, q, ds.Site(ds.Grid(1, 1, 1), step=step, both_branches=True)) is None
    assert len(calls) == 1 and len(calls[0][0]) == 1


@pytest.mark.parametrize("both_branches", [False, True])
@pytest.mark.parametrize("name", [*ds.METHODS, "vdit.vertical", "pooled(svg2)", "cached(sparge)"])
def test_plans_do_not_depend_on_padding(name, both_branches):
    grid, lengths = ds.Grid(3, 4, 5, after=30), torch.tensor([60, 90, 71, 66])
    padding = (torch.arange(grid.tokens) >= lengths[:, None])[:, None, :, None]
    tensors = torch.randn(3, 4, 2, grid.tokens, 16, generator=torch.Generator().manual_seed(0))
    masks = []
    for value in (0.0, 9.0, torch.nan, torch.inf):
        q, k, v = (x.masked_fill(padding, value) for x in tensors)
        site = ds.Site(grid, 16, steps=4, both_branches=both_branches)
        plan = Plans(method(name, density=0.4)).plan(q, k, site, lengths, v)
        masks.append(True if plan is None else plan.token_mask(torch.arange(grid.tokens)))
    assert all(torch.as_tensor(mask).equal(torch.as_tensor(masks[0])) for mask in masks)


def random_plan(clusters: bool, batch: int, grid: ds.Grid, order: str) -> Plan | ClusterPlan:
    """Return a random plan of two heads, with an order per head, shared by all heads, or none."""
    lead, tokens = (batch, 2), grid.tokens
    if clusters:
        sides = [Clusters.from_labels(torch.randint(0, 5, (*lead, tokens)), 5) for _ in range(2)]
        keep = torch.rand(*lead, 5, 5) < 0.5
        return ClusterPlan.from_mask(keep | torch.eye(5, dtype=torch.bool), *sides)
    places = torch.rand(*lead, tokens).argsort(-1)
    blocks = -(-tokens // 16)
    keep = (torch.rand(*lead, blocks, blocks) < 0.4) | torch.eye(blocks, dtype=torch.bool)
    return Plan.from_mask(keep, tokens, 16, {"per head": places, "shared": places[0, 0], "none": None}[order])


@given(
    st.booleans(),
    st.integers(1, 3),
    grids(4),
    st.sampled_from(["per head", "shared", "none"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_repeat_batch(clusters, batch, grid, order, padded, seed):
    torch.manual_seed(seed)
    plan = random_plan(clusters, batch, grid, order)
    if clusters:  # sizes shared by all items, with an order per item
        edges = torch.linspace(0, grid.tokens, 6).int()[None, None]
        plan = replace(plan, keys=replace(plan.keys, edges=edges))
    plan = plan.with_lengths(torch.randint(1, grid.tokens + 1, (batch,)) if padded else None)
    halves = torch.randn(2, 3, batch, 2, grid.tokens, 8)
    together = reference.attend(*torch.cat([*halves], 1), plan.repeat_batch())
    for i in range(2):
        for whole, half in zip(together, reference.attend(*halves[i], plan), strict=True):
            assert whole[i * batch : (i + 1) * batch].equal(half)


def correct(method: Rettention, plans: Plans, q: Tensor, k: Tensor, v: Tensor, site: ds.Site) -> tuple[Tensor, Plan]:
    """Return the corrected output and the plan of one call."""
    plan = plans.plan(q, k, site)
    attend_densely = partial(reference.attend, q, k, v, plan.full())
    output = AttentionOutput(q, k, v, plan, None, *reference.attend(q, k, v, plan), attend_densely)
    return method.correct(output, site, plans.memory(q, site))[0], plan


@pytest.mark.parametrize("inner", ["window", "adaspa", "svg2"])
def test_rettention_keeps_a_residual_per_branch(inner):
    """Both branches share a plan. While q, k and v stay the same, the output equals the dense one of each branch."""
    grid, rettention = ds.Grid(4, 5, 6), Rettention(inner=method(inner, density=0.3), ramp=0.0, refresh_interval=3)
    plans = Plans(rettention)
    branches = {name: torch.randn(3, 1, 2, grid.tokens, 16) for name in ("cond", "uncond")}
    for step in range(2, 7):
        step_plans = []
        for name, (q, k, v) in branches.items():
            site = ds.Site(grid, 16, step=step, branch=name, plan_group="both")
            out, plan = correct(rettention, plans, q, k, v, site)
            assert_near(out, reference.attend(q, k, v, plan.full())[0])
            step_plans.append(plan)
        assert step_plans[0] is step_plans[1]


RAMP = ds.Schedule(dense_steps=1, replan_interval=2, density_ramp=(1.5, 0.5))


@pytest.mark.parametrize("name", ["window", "radial|sink", "svg", "svg2", "sparsed", "cached(asa)", "pooled(adaspa)"])
def test_every_method_follows_the_ramp_of_the_schedule(name):
    """Also those that are planned once per grid, or keep a plan themselves. Branches still share plans."""
    torch.manual_seed(0)
    plans, grid, q = Plans(method(name, density=0.4), RAMP), ds.Grid(6, 8, 8), torch.randn(1, 2, 384, 16)
    densities = []
    for step in range(1, 7):
        site = ds.Site(grid, 16, step=step, steps=7, branch="a", plan_group="ab")
        plan = plans.plan(q, q, site)
        assert plans.plan(q + 1, q, replace(site, branch="b")) is plan
        densities.append(plan.density)
        assert densities[-1] == pytest.approx(plans.density_at(site), abs=0.02)
    assert sum(densities) / 6 == pytest.approx(0.4, abs=0.02)
    assert len({round(density, 2) for density in densities}) == 3


def test_profiles_follow_the_ramp():
    methods = ("a", method("window", density=0.2)), ("b", method("radial", density=0.4))
    profile = PerHead(methods=methods, layers=("ab",))
    plans, q = Plans(profile, RAMP), torch.randn(1, 2, 384, 16)
    sites = [ds.Site(ds.Grid(6, 8, 8), 16, step=step, steps=7) for step in range(1, 7)]
    densities = torch.stack([plans.plan(q, q, site).density_by_head[0] for site in sites])
    assert densities.mean(0).tolist() == pytest.approx([0.2, 0.4], abs=0.02)
    assert (densities[0] > densities[5] + 0.1).all()


def test_static_plans_are_solved_once_per_density():
    plans, q = Plans(method("window", density=0.3), RAMP), torch.zeros(1, 1, 384, 8)
    site = lambda step, layer: ds.Site(ds.Grid(6, 8, 8), 16, layer=layer, layers=3, step=step, steps=7)
    made = {id(plans.plan(q, q, site(step, layer))) for step in range(1, 7) for layer in range(3)}
    assert len(made) == 3
    plans.end_generation()
    assert id(plans.plan(q, q, site(1, 0))) in made


@dataclass(frozen=True, kw_only=True)
class OutputError(ds.Scorer):
    """Ranks blocks by the norm of what they add to the output, which needs the values."""

    needs_values: ClassVar[bool] = True

    def score(self, q, k, v, site, memory):
        means = [pool(x, site.block) for x in (q, k, v)]
        return means[0] @ means[1].mT + means[2].norm(dim=-1).log()[:, :, None]


@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: ds.Cached(inner=one), lambda one: per_head(one)])
def test_methods_that_ask_for_values_get_them(wrap):
    """In a pipeline, wrapped and head by head; padding is zero and other methods get None."""
    stock = cached_pipeline("hunyuan_video")
    with enable_sparse(stock, wrap(OutputError(density=0.4)), density=None) as run:
        generate(stock)
    assert run.report().sparse_calls > 0
    seen = []
    q, v = torch.randn(2, 2, 48, 8), torch.randn(2, 2, 48, 8)
    site, lengths = ds.Site(ds.Grid(1, 4, 8, after=16), block=16), torch.tensor([48, 40])
    for values in (True, False):
        one = recorder(lambda q, k, v, *_: seen.append(v))
        type(one).needs_values = values
        Plans(one).plan(q, q, site, lengths, v)
    assert seen[1] is None and seen[0][1, :, 40:].eq(0).all() and seen[0][0].equal(v[0])


def per_head(one: ds.Method) -> ds.Method:
    other = method("radial", density=0.4)
    return ds.PerHead(
        methods=(("a", one), ("b", other)), layers=("ab",) * count_layers(cached_pipeline("hunyuan_video"))
    )


@dataclass(frozen=True, kw_only=True)
class FirstLayerPlans(ds.Method):
    """The first layer plans; the others reuse its plan, in compositions, too."""

    def plan(self, q, k, v, site, memory):
        if site.layer == 0:
            shared_memory(memory)["plan"] = random_plan(False, len(q), site.grid, "none")
        return shared_memory(memory)["plan"]


@pytest.mark.parametrize("wrap", [lambda method: method, lambda method: ds.Cached(inner=method, replan_interval=2)])
def test_layers_share_one_dict_per_branch_until_the_generation_ends(wrap):
    plans, q = Plans(wrap(FirstLayerPlans()), ds.Schedule(replan_interval=1)), torch.randn(1, 2, 32, 8)
    site = lambda layer, branch, step=0: ds.Site(ds.Grid(2, 4, 4), 8, layer, 3, step, 9, branch, branch)
    first = {branch: [plans.plan(q, q, site(i, branch)) for i in range(3)] for branch in ("cond", "uncond")}
    for of_branch in first.values():
        assert all(plan is of_branch[0] for plan in of_branch)
    assert first["cond"][0] is not first["uncond"][0]
    plans.end_generation()
    with pytest.raises(KeyError):
        plans.plan(q, q, site(1, "cond", 1))
