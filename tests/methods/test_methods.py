"""Laws that every method obeys on every grid."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
import torch.nn.functional as F

from attention_cases import BlockMeans, assert_near, cluster_token_mask, make, plan_of, qkv
from dit_sparse import METHODS, ClusterPlan, Grid, Mass, Method, Plan, Site, attention
from dit_sparse.grid import Blocks
from dit_sparse.method import required_blocks
from dit_sparse.methods import method, name_of

GRIDS = [Grid(5, 7, 3, after=11), Grid(4, 6, 5, before=3), Grid(9, 8, 10), Grid(1, 9, 7), Grid(2, 16, 16)]
BLOCKS = [16, 32, 32, 16, 32]  # one for each grid
NAMES = [*METHODS, "block_means", "block_means_hilbert"]

every_method = pytest.mark.parametrize("name", NAMES)
every_grid = pytest.mark.parametrize(("grid", "block"), list(zip(GRIDS, BLOCKS, strict=True)), ids=str)


def required(method: Method, grid: Grid, block: int) -> torch.Tensor:
    """Rows and columns of blocks with text, and the diagonal."""
    text = grid.coordinates(method.order(grid, block))[3]
    has_text = torch.tensor([bool(part.any()) for part in text.split(block)])
    return has_text[:, None] | has_text | torch.eye(len(has_text), dtype=torch.bool)


@every_method
@every_grid
def test_text_and_diagonal_are_kept(name, grid, block):
    method = make(name, density=0.05 if block == 32 else 0.4)
    plan = plan_of(method, grid, block)
    assert plan.tokens == grid.tokens and (plan.count >= 1).all()
    if isinstance(plan, ClusterPlan):
        mask, text = cluster_token_mask(plan, 1, 2), grid.coordinates()[3]
        assert mask[..., text, :].all() and mask[..., text].all() and mask.any(-1).all()
        return
    order = method.order(grid, block)
    assert plan.block == block
    assert (plan.block_mask() | ~required(method, grid, block)).all()
    assert required_blocks(Blocks.from_grid(grid, block, order)).equal(required(method, grid, block))
    assert order is None or plan.order.equal(order)


@every_method
@every_grid
def test_density_one_is_dense_attention(name, grid, block):
    q, k, v = qkv(grid.tokens, batch=2, dim=16)
    method = make(name, density=1.0)
    assert plan_of(method, grid, block, q, k).block_mask().all()
    out, lse = attention(q, k, v, grid=grid, method=method, block=block, executor="gather")
    assert_near(out, F.scaled_dot_product_attention(q, k, v), 1e-5)
    assert_near(lse, torch.logsumexp(q @ k.mT * 0.25, -1), 1e-5)


@every_method
@pytest.mark.parametrize("grid", GRIDS[::3], ids=str)
def test_same_inputs_give_the_same_plan(name, grid):
    first, second = (plan_of(make(name, density=0.3), grid, 16) for _ in range(2))
    assert first.block_mask().equal(second.block_mask()) and first.index.equal(second.index)


def differ(first: Plan, second: Plan) -> bool:
    reordered = first.order is not None and not first.order.equal(second.order)
    return reordered or not first.block_mask().equal(second.block_mask())


@every_method
def test_plans_depend_on_the_grid(name):
    """Static plans depend on nothing else."""
    method, first, second = make(name, density=0.3), Grid(4, 8, 6), Grid(6, 4, 8)
    q, k, _ = qkv(first.tokens, dim=8)
    plan = plan_of(method, first, 16, q, k)
    if method.static:
        assert not differ(plan, plan_of(method, first, 16, k, q))
    if method.static or method.order(first, 16) is not None:
        depends = method.depends_on_shape and not method.keeps_model_attention
        assert differ(plan, plan_of(method, second, 16, q, k)) == depends
    assert plan_of(method, Grid(4, 8, 7), 16).tokens == 224
    assert plan_of(method, first, 32, q, k).query_sizes.sum(-1).eq(first.tokens).all()


@every_method
def test_methods_are_values(name):
    method, equal, other = make(name, density=0.3), make(name, density=0.3), make(name, density=0.4)
    assert method == equal and hash(method) == hash(equal) and method != other
    assert pickle.loads(pickle.dumps(method)) == method
    assert method.settings()["density"] == 0.3
    with pytest.raises(AttributeError):
        method.density = 0.5


@pytest.mark.parametrize("name", METHODS)
def test_repr_shows_the_changed_settings(name):
    cls = METHODS[name].__name__
    assert [repr(method(name)), repr(method(name, density=0.3))] == [f"{cls}()", f"{cls}(density=0.3)"]


@pytest.mark.parametrize("name", METHODS)
def test_settings_are_restored_from_json(name):
    for one in (method(name, density=0.3), method(name, density=0.7)):
        assert name_of(one) == name
        assert method(name, **json.loads(json.dumps(one.settings()))) == one


def test_a_budget_is_part_of_the_settings():
    settings = json.loads(json.dumps(BlockMeans(budget=Mass(0.9)).settings()))
    budget = {"Mass": {"top_p": 0.9, "min_ratio": 0.0, "max_ratio": 1.0}}
    assert settings == {"density": None, "budget": budget, "hilbert": False}


def test_a_scorer_takes_a_density_or_a_budget():
    assert_one_sentence(lambda: BlockMeans(density=0.5, budget=Mass(0.9)), "not both")


@every_method
def test_density_must_be_a_fraction(name):
    for density in (0, -0.5, 1.5, float("nan")):
        assert_one_sentence(lambda density=density: make(name, density=density), "density must be in (0, 1]")


@every_method
def test_a_method_works_without_a_density_or_asks_for_one(name):
    grid = Grid(3, 5, 4)
    try:
        method = make(name, density=None)
    except ValueError as error:
        assert "density" in str(error)
    else:
        assert plan_of(method, grid, 16).tokens == grid.tokens


@pytest.mark.parametrize("name", METHODS)
def test_unknown_settings_are_named(name):
    assert_one_sentence(lambda: method(name, wdith=3), f"{name} has no setting 'wdith'")


def test_unknown_methods_are_named():
    assert_one_sentence(lambda: method("radail"), "no method 'radail'; did you mean 'radial'?")


@pytest.mark.parametrize(
    "name, settings",
    [
        ("radial", {"decay": 0.0}),
        ("radial", {"dense_distance": -2}),
        ("radial", {"min_width": -1.0}),
        ("window", {"radius": 0.0}),
        ("window", {"radius": 1.5}),
        ("neighborhood", {"window": 0.0}),
        ("neighborhood", {"stride": (-1, 1, 1)}),
        ("neighborhood", {"dilation": (1, 0, 1)}),
        ("neighborhood", {"tile": (0, 4, 4)}),
        ("sink", {"frames": float("nan")}),
        ("xattention", {"stride": 0}),
        ("subblock", {"subblocks": 0}),
        ("asa", {"samples": 0}),
        ("sparge", {"similarity_threshold": 1.5}),
        ("flexprefill", {"probe_blocks": 1}),
        ("sale", {"max_error": 0.0}),
        ("hip", {"keys": 0}),
        ("infllm_v2", {"head_group": 0}),
        ("spark", {"channels": 1.5}),
        ("sol", {"budget": 3}),
        ("svg", {"samples": 0}),
        ("vdit", {"samples": 0}),
        ("vdit.vertical", {"samples": 0}),
        ("svg2", {"iterations": 0}),
        ("svg2", {"top_p": 1.5}),
        ("pbs", {"probe_queries": 0}),
        ("pbs", {"top_p": 0.0}),
        ("dhsa", {"threshold": 0.9}),
        ("double_sparsity", {"share": 0.0}),
        ("double_sparsity", {"channels": (((0, 1), (2,)),)}),
        ("gui_kv", {"redundancy": 1.5}),
        ("proxyattn", {"mass": 0.0}),
        ("deltallm", {"window": -1}),
        ("nosa", {"agnostic": 1.5}),
        ("token_select", {"similarity": 2.0}),
        ("adaspa", {"search_interval": 0}),
        ("adaspa", {"queries_per_block": 0}),
        ("sparsed", {"queries_per_block": -1}),
        ("sparsed", {"groups": 0}),
        ("rettention", {"refresh_interval": 0}),
        ("rettention", {"ramp": -1.0}),
    ],
    ids=str,
)
def test_values_out_of_range_are_named(name, settings):
    assert_one_sentence(lambda: method(name, **settings), next(iter(settings)))


@pytest.mark.parametrize(
    "name, setting",
    [
        ("xattention", "stride"),
        ("subblock", "subblocks"),
        ("infllm_v2", "stride"),
        ("double_sparsity", "queries_per_block"),
        ("proxyattn", "stride"),
        ("token_select", "queries_per_block"),
        ("adaspa", "queries_per_block"),
        ("sparsed", "queries_per_block"),
    ],
)
def test_some_settings_must_divide_the_block(name, setting):
    """Methods with a state raise before the generation, others at the first plan."""
    (q, k, _), site, one = qkv(116), Site(Grid(5, 7, 3, after=11), 24), method(name, **{setting: 16})

    def plan() -> None:
        one.begin_generation(q, site)
        assert not one.manages_own_plans
        one.plan(q, k, k, site, {})

    assert_one_sentence(plan, f"{setting} must divide the block of 24, got 16")


def assert_one_sentence(call, words: str) -> None:
    """Assert that a call raises a ValueError with these words and a short message."""
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert words in message and "\n" not in message and 20 < len(message) < 200
