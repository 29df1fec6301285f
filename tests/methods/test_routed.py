"""Routed attention: its plans, the parts of its score, and its residual."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dit_sparse as ds
from attention_cases import assert_near, plan_of, qkv
from dit_sparse.engine.plans import Plans
from dit_sparse.kernels import free_memory
from dit_sparse.kernels.executors import reference
from dit_sparse.kernels.planning.pooling_error import mass_and_spread, pooling_error
from dit_sparse.method import AttentionOutput
from dit_sparse.methods.corrections.routed import Routed
from dit_sparse.order import nested_boxes
from sparse_pipelines import cached_pipeline, enable_sparse, generate

GRIDS = [ds.Grid(5, 7, 3, after=11), ds.Grid(4, 6, 5, before=3), ds.Grid(8, 8, 9), ds.Grid(2, 3, 2)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: str(grid).replace(" ", ""))


@every_grid
@pytest.mark.parametrize("block", [16, 64])
def test_rows_keep_the_tiles_with_the_highest_scores(grid, block):
    """Tiles are cut from the nested boxes; text is one more block and one more tile, which all attend."""
    q, k, _ = qkv(grid.tokens, batch=2, dim=16, key_heads=1)
    one = Routed(density=0.4, key_tile=8)
    plan = plan_of(one, grid, block, q, k)
    order, text = nested_boxes(grid), grid.coordinates()[3]
    video = order[~text]
    assert plan.keys.order[0, 0].equal(torch.cat([video, order[text]])) and plan.queries.order.equal(plan.keys.order)
    scores = one.score(q[:, :, video], k.expand_as(q)[:, :, video], block)
    keep = plan.block_mask()[..., : scores.shape[2], : scores.shape[3]]
    worst_kept = scores.masked_fill(~keep, torch.inf).amin(-1)
    assert (scores.masked_fill(keep, -torch.inf).amax(-1) <= worst_kept).all()
    assert (keep.sum(-1) >= 1).all() and keep.sum(-1).amax() - keep.sum(-1).amin() <= 2
    assert plan.tail == 16


@pytest.mark.parametrize(
    "settings", [{"spread": False}, {"every": None}, {"spread": False, "every": None}, {"every": 3}]
)
def test_every_part_of_the_score_can_be_left_out(settings):
    q, k, _ = qkv(320, dim=16)
    one, whole = (Routed(density=0.3, key_tile=16, **other) for other in (settings, {}))
    assert not one.score(q, k, 64).allclose(whole.score(q, k, 64))
    mass = mass_and_spread(q, k, 64, 16, one.spread)
    expected = mass if one.every is None else mass * pooling_error(q, k, 64, 16, one.every)
    assert_near(one.score(q, k, 64), expected, 1e-6)


def test_other_parts_can_be_left_out():
    grid, plain = ds.Grid(4, 8, 8), Routed(boxes=False, tail=None, density_ramp=None, residual=None)
    plan = plan_of(plain, grid, 64)
    assert plan.tail is None and plan.keys.order.equal(torch.arange(256)[None, None])
    assert plain.density_ramp is None and not plain.observes_dense
    assert Routed().observes_dense and Routed().density_ramp == (1.3, 0.6)


# --- residual


def observe_and_correct(one: Routed, plans: Plans, tensors: dict, step: int, both: bool = False) -> dict[str, Tensor]:
    """Show the method a dense step of every branch; return its output in the first steps after it, by branch."""
    grid, outputs = ds.Grid(4, 5, 6), {}
    site = lambda name, step: ds.Site(grid, 16, step=step, steps=8, branch=name, plan_group="g", both_branches=both)
    for name, (q, k, v) in tensors.items():
        plan = plans.preview(q, k, site(name, 1))
        out = reference.attend(q, k, v, plan)[0]
        dense = lambda q=q, k=k, v=v: (F.scaled_dot_product_attention(q, k, v), None)
        result = AttentionOutput(q, k, v, plan, None, out, None, dense)
        if one.observes_dense:
            one.observe_dense(result, site(name, 1), plans.memory(q, site(name, 1)))
    for now in range(2, step + 1):
        for name, (q, k, v) in tensors.items():
            plan = plans.plan(q, k, site(name, now))
            result = AttentionOutput(q, k, v, plan, None, *reference.attend(q, k, v, plan), lambda: None)
            outputs[name] = one.correct(result, site(name, now), plans.memory(q, site(name, now)))[0]
    return outputs


def random_branches(names: str) -> dict[str, list[Tensor]]:
    return {name: qkv(120, batch=2, dim=16, seed=seed) for seed, name in enumerate(names)}


SCHEDULE = ds.Schedule(dense_steps=2, density_ramp=(1, 1))


def test_without_guidance_the_residual_restores_the_dense_output():
    """With alpha 1, the same inputs and the same plan, what was lost is added."""
    one, tensors = Routed(density=0.3, residual=1.0), random_branches("a")
    (out,) = observe_and_correct(one, Plans(one, SCHEDULE), tensors, 3).values()
    assert_near(out, F.scaled_dot_product_attention(*tensors["a"]), 1e-5)


def test_the_residual_is_the_mean_over_the_branches_in_both_layouts():
    """One batch with both branches, the conditional one second, or two calls, the conditional one first."""
    one, tensors = Routed(density=0.3, residual=0.7), random_branches("cu")
    calls = observe_and_correct(one, Plans(one, SCHEDULE), tensors, 2)
    batch = {"": [torch.cat(pair) for pair in zip(tensors["u"], tensors["c"], strict=True)]}
    together = observe_and_correct(one, Plans(one, SCHEDULE), batch, 2, both=True)[""]
    assert_near(together, torch.cat([calls["u"], calls["c"]]), 1e-5)
    plan = Plans(one, SCHEDULE).plan(*tensors["c"][:2], ds.Site(ds.Grid(4, 5, 6), 16, step=2, steps=8))
    sparse = {name: reference.attend(*x, plan)[0] for name, x in tensors.items()}
    lost = sum(F.scaled_dot_product_attention(*x) - sparse[name] for name, x in tensors.items()) / 2
    for name, out in calls.items():
        assert_near(out, sparse[name] + 0.7 * lost, 1e-5)


def test_the_residual_fades_and_ends_with_the_second_plan():
    one, tensors = Routed(density=0.3, residual=0.5), random_branches("a")
    none = replace(one, residual=None)
    outputs = [observe_and_correct(one, Plans(one, SCHEDULE), tensors, step)["a"] for step in (2, 3, 4)]
    plain = observe_and_correct(none, Plans(none, SCHEDULE), tensors, 2)["a"]
    assert_near(outputs[1] - plain, (outputs[0] - plain) / 2, 1e-4)
    assert_near(outputs[2], plain, 1e-6)


def test_a_residual_that_does_not_fit_is_left_out_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(free_memory, "_free_bytes", lambda device: 1000)
    stock = cached_pipeline("wan")
    with enable_sparse(stock, "routed", density=0.3):
        without_room = generate(stock)
    warnings = [record.getMessage() for record in caplog.records if "residual" in record.getMessage()]
    assert len(warnings) == 1 and "0.00 GiB are free: it is left out" in warnings[0]
    with enable_sparse(stock, "routed(residual=none)", density=0.3):
        assert generate(stock).equal(without_room)


@pytest.mark.parametrize("both", [False, True])
def test_the_memory_of_the_residual_is_one_output_per_layer_and_prompt(monkeypatch, both):
    """It fits in exactly this memory."""
    q, k, v = qkv(50, batch=4, heads=3, dim=16)
    site = ds.Site(ds.Grid(2, 5, 5), 16, layers=7, both_branches=both)
    need = 7 * (2 if both else 4) * 3 * 50 * 16 * 4
    for free in (need - 1, need):
        monkeypatch.setattr(free_memory, "_free_bytes", lambda device, free=free: free)
        result, memory = AttentionOutput(q, k, v, None, None, v, None, lambda: (v, None)), {}
        Routed().observe_dense(result, site, memory)
        assert ("residual" in memory) == (free == need)
