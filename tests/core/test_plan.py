"""Plans of blocks and clusters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention_cases import (
    assert_near,
    cluster_token_mask,
    qkv,
    random_cluster_plan,
    random_plan,
    token_mask,
)
from dit_sparse import Grid, Plan, Site
from dit_sparse.kernels.executors import reference
from dit_sparse.methods import method
from dit_sparse.plan import num_blocks

both_kinds = pytest.mark.parametrize(
    "plan, mask",
    [(random_plan(116, 16, heads=2), token_mask), (random_cluster_plan(116, heads=2), cluster_token_mask)],
    ids=["blocks", "clusters"],
)


@st.composite
def block_masks(draw):
    """A block mask without an empty row, the number of tokens, and the block size."""
    block, blocks = draw(st.integers(1, 20)), draw(st.integers(1, 12))
    tokens = block * (blocks - 1) + draw(st.integers(1, block))
    shape = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 3)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    keep = torch.rand(*shape, blocks, blocks, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    one_per_row = torch.randint(blocks, (*shape, blocks, 1), generator=generator)
    return keep.scatter(-1, one_per_row, True), tokens, block


@given(block_masks())
def test_a_plan_holds_its_mask_as_lists(case):
    keep, tokens, block = case
    plan = Plan.from_mask(keep, tokens, block)
    assert plan.block_mask().equal(keep)
    assert plan.blocks == keep.shape[-1] == num_blocks(tokens, block)
    assert plan.query_sizes.sum() == tokens
    assert (plan.index.dtype, plan.count.dtype) == (torch.int32, torch.int32)
    assert plan.index.shape[-1] == plan.count.max(), "no wider than the fullest row"
    assert plan.index.min() >= 0 and plan.index.max() < plan.blocks, "entries that are not valid are block numbers, too"
    rows = zip(plan.index.flatten(0, -2), plan.count.flatten(), keep.flatten(0, -2), strict=True)
    for index, count, row in rows:
        assert index[: int(count)].tolist() == row.nonzero().flatten().tolist()


@given(block_masks())
def test_density_counts_token_pairs(case):
    keep, tokens, block = case
    plan = Plan.from_mask(keep, tokens, block)
    mean = token_mask(plan, *keep.shape[:2]).double().mean()
    assert plan.density == pytest.approx(float(mean), abs=1e-12)
    assert Plan.dense(tokens, block).density == 1


def test_empty_rows_and_wrong_masks_are_refused():
    keep = torch.eye(3, dtype=torch.bool)[None, None]
    assert Plan.from_mask(keep, 33, 16).blocks == 3
    with pytest.raises(ValueError, match="keeps no key block"):
        Plan.from_mask(keep & (torch.arange(3) < 2), 33, 16)
    for tokens, block, mask in [(32, 16, keep), (49, 16, keep), (33, 16, keep[0])]:
        with pytest.raises(ValueError, match="need a mask"):
            Plan.from_mask(mask, tokens, block)


@pytest.mark.parametrize("lead", [(), (1, 1), (1, 3), (2, 1), (2, 3)], ids=str)
def test_restore_is_the_inverse_of_arrange(lead):
    orders = torch.rand(*lead, 37).argsort(-1)
    plan = random_plan(37, 8, order=orders)
    for x in (torch.randn(2, 3, 37, 5), torch.randn(2, 3, 37)):
        arranged = plan.arrange(x)
        assert plan.restore(arranged).equal(x)
        for b in range(2):
            for h in range(3):
                own = orders if not lead else orders[min(b, lead[0] - 1), min(h, lead[1] - 1)]
                assert arranged[b, h].equal(x[b, h, own])


def test_a_plan_without_an_order_returns_its_input():
    plan, x = random_plan(37, 8), torch.randn(1, 1, 37, 5)
    assert plan.arrange(x) is x and plan.restore(x) is x


def test_with_lengths_adds_the_lengths():
    plan = random_plan(37, 8)
    assert plan.with_lengths(None) is plan
    padded = plan.with_lengths(torch.tensor([30, 37]))
    assert padded.lengths.dtype == torch.int32 and padded.lengths.tolist() == [30, 37]
    assert padded.index is plan.index and padded.to("cpu").lengths.equal(padded.lengths)


@pytest.mark.parametrize("name", ["radial", "random_blocks"])
def test_the_plan_of_a_long_video_is_small(name):
    """A mask of all pairs of 33 x 45 x 80 tokens would take 14 GB."""
    grid = Grid(33, 45, 80)
    plan = method(name, density=0.1).plan(torch.empty(1, 2, 1), None, None, Site(grid, 128), {})
    tensors = [x for x in (plan.index, plan.count, plan.order) if x is not None]
    assert grid.tokens == plan.tokens == 118_800
    assert sum(x.numel() * x.element_size() for x in tensors) < 20e6
    assert plan.density == pytest.approx(0.1, rel=0.02)


def test_by_head_takes_each_head_from_its_plan():
    order = torch.randperm(116, generator=torch.Generator().manual_seed(0))
    settings = [(0.2, None, 1), (0.7, order, 1), (0.4, None, 3)]
    plans = [random_plan(116, 16, density=d, seed=i, order=o, heads=h) for i, (d, o, h) in enumerate(settings)]
    choice = torch.tensor([[0, 1, 2], [2, 2, 1]])
    masks = [token_mask(plan, 2, 3) for plan in plans]
    combined = token_mask(Plan.by_head(plans, choice), 2, 3)
    for b in range(2):
        for h in range(3):
            assert combined[b, h].equal(masks[choice[b, h]][b, h])


@both_kinds
def test_the_full_plan_is_dense(plan, mask):
    assert plan.full().block_mask().all() and plan.full().density == pytest.approx(1)
    q, k, v = qkv(116, batch=2)
    for lengths in (None, torch.tensor([116, 116])):
        out, _ = reference.attend(q, k, v, plan.full().with_lengths(lengths))
        assert_near(out, torch.nn.functional.scaled_dot_product_attention(q, k, v), 1e-5)


@both_kinds
def test_token_mask_is_the_mask_of_some_queries(plan, mask):
    rows = torch.tensor([0, 7, 115, 7])
    assert plan.token_mask(rows).expand(1, 2, -1, -1).equal(mask(plan, 1, 2)[:, :, rows])


# --- for notebooks


@both_kinds
def test_repr_is_one_line(plan, mask):
    groups = {"Plan": "8 blocks of 16", "ClusterPlan": "5 x 9 clusters"}[type(plan).__name__]
    text = f"{type(plan).__name__}(116 tokens, {groups}, density "
    assert repr(plan) == f"{text}{plan.density:.2f})"
    assert repr(plan.to("meta")) == f"{text}unknown)"


def test_repr_of_clusters_is_one_line():
    assert repr(random_cluster_plan(116).keys.to("meta")) == "Clusters(116 tokens in 9 clusters)"


@both_kinds
def test_plans_are_drawn_in_notebooks(plan, mask):
    assert len(plan.plot().axes) == 1 and len(plan.plot(Grid(4, 29, 1)).axes) == 2
    assert plan._repr_html_().startswith(f"<p>{plan}</p><")
    assert plan.to("meta")._repr_html_().endswith("density unknown)</p>")
