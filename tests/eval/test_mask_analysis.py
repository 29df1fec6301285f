"""Upper bounds on retained attention, checked by brute force and on every method, and the analysis of a model."""

import json
from dataclasses import dataclass
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from attention_cases import cluster_token_mask, exact, qkv, random_cluster_plan, random_plan, token_mask
from dit_sparse import ClusterPlan, Grid, Plan, Schedule, Site
from dit_sparse.engine.plans import Plans
from dit_sparse.eval.analysis.mask_analysis import MaskAnalysis, plot_efficiency
from dit_sparse.eval.analysis.mask_probe import METRICS, measure_mask
from dit_sparse.eval.analysis.upper_bounds import group_mass, max_mass, retained_and_bounds
from dit_sparse.kernels.executors import reference
from dit_sparse.method import AttentionOutput
from dit_sparse.methods import METHODS, method

GRID, BLOCK = Grid(3, 5, 7, after=11), 16  # 116 tokens: 7 whole blocks and a ragged one


def dense_call(grid: Grid, block: int, lengths=None, **shape) -> tuple[AttentionOutput, Site, Tensor]:
    """Return a dense call, its site, and its mass in row-major blocks."""
    q, k, v = qkv(grid.tokens, **{"batch": 2, "heads": 4, "key_heads": 2} | shape)
    plan = Plan.dense(grid.tokens, block).with_lengths(None if lengths is None else torch.tensor(lengths))
    out, lse = reference.attend(q, k, v, plan)
    dense = AttentionOutput(q, k, v, plan, None, out, lse, lambda: (out, lse))
    return dense, Site(grid, block), group_mass(q, k, lse, plan)


def weights(dense: AttentionOutput) -> Tensor:
    """Return attention weights over the number of queries, float64 ``[B, H, N, N]``; 0 in rows of padding."""
    q, k = dense.q.double(), dense.k.double().repeat_interleave(dense.q.shape[1] // dense.k.shape[1], 1)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if dense.plan.lengths is None:
        return scores.softmax(-1) / q.shape[2]
    real = (torch.arange(q.shape[2]) < dense.plan.lengths[:, None])[:, None]
    attention = scores.masked_fill(~real[..., None, :], -torch.inf).softmax(-1)
    return attention * real[..., None] / dense.plan.lengths[:, None, None, None]


def expanded_mask(plan) -> Tensor:
    return (cluster_token_mask if isinstance(plan, ClusterPlan) else token_mask)(plan, 2, 4)


PLANS = {
    "row-major": lambda: random_plan(GRID.tokens, BLOCK, batch=2, heads=4),
    "ordered": lambda: random_plan(GRID.tokens, BLOCK, heads=4, order=torch.randperm(GRID.tokens)),
    "an order per head": lambda: random_plan(
        GRID.tokens, BLOCK, batch=2, heads=4, order=torch.rand(2, 4, GRID.tokens).argsort(-1)
    ),
    "padded": lambda: random_plan(GRID.tokens, BLOCK, batch=2, heads=4, lengths=(116, 106)),
    "clusters": lambda: random_cluster_plan(GRID.tokens, batch=2, heads=4),
    "padded clusters": lambda: random_cluster_plan(GRID.tokens, batch=2, heads=4, lengths=(116, 106)),
}


@pytest.mark.parametrize("name", PLANS)
def test_group_mass_and_retained_mass_are_sums_of_attention(name):
    plan = PLANS[name]()
    dense, site, row_major = dense_call(GRID, BLOCK, None if plan.lengths is None else plan.lengths.tolist())
    mass, attention = group_mass(dense.q, dense.k, dense.lse, plan), weights(dense)
    rows, columns = (g.expand(2, 4, -1) for g in (plan.query_group, plan.key_group))
    for b, h in product(range(2), range(4)):
        expected = torch.zeros(mass.shape[2:], dtype=torch.float64)
        group_pair = rows[b, h][:, None] * mass.shape[3] + columns[b, h]
        expected.view(-1).index_add_(0, group_pair.flatten(), attention[b, h].flatten())
        torch.testing.assert_close(mass[b, h], expected, atol=1e-6, rtol=1e-4)
    bounds = retained_and_bounds(dense, plan, site, row_major)
    retained = (attention * expanded_mask(plan)).sum((-2, -1))
    torch.testing.assert_close(bounds["retained"], retained, atol=1e-6, rtol=1e-4)
    assert_ordered(bounds)


def assert_ordered(metrics: dict[str, Tensor]) -> None:
    assert (metrics["retained"] <= metrics["best_by_row"] + 1e-9).all()
    assert (metrics["best_by_row"] <= metrics["best"] + 1e-9).all() and (metrics["best"] <= 1 + 1e-9).all()


def all_masks(blocks: int) -> Tensor:
    """Return every block mask, ``[2 ** (blocks * blocks), blocks, blocks]``."""
    number = torch.arange(2 ** (blocks * blocks))
    return (number[:, None] >> torch.arange(blocks * blocks) & 1).bool().view(-1, blocks, blocks)


@pytest.mark.parametrize("grid", [Grid(3, 4, 4), Grid(2, 4, 4, after=16), Grid(3, 4, 4, after=3)], ids=str)
def test_bounds_equal_the_best_mask_by_brute_force(grid):
    """They are equal if no block is ragged; otherwise no mask exceeds them, and the best is within one block."""
    dense, site, row_major = dense_call(grid, BLOCK, heads=2, key_heads=2)
    plan = method("random_blocks", density=0.4, seed=3).plan(dense.q, dense.k, dense.k, site, {})
    bounds, attention, blocks = retained_and_bounds(dense, plan, site, row_major), weights(dense), plan.blocks
    group = torch.arange(grid.tokens) // BLOCK
    size = torch.bincount(group).double()
    keep, masks = plan.block_mask().expand(2, 2, -1, -1), all_masks(blocks)
    text = [bool((group[grid.video :] == b).any()) for b in range(blocks)]
    required = torch.eye(blocks, dtype=torch.bool) | torch.tensor(text)[:, None] | torch.tensor(text)
    masks = masks[masks[:, required].all(1)].double()
    pairs = masks * size[:, None] * size
    for b, h in product(range(2), range(2)):
        budget = (keep[b, h] * size[:, None] * size).sum(-1)
        mass = torch.zeros(blocks, blocks, dtype=torch.float64)
        mass.view(-1).index_add_(0, (group[:, None] * blocks + group).flatten(), attention[b, h].flatten())
        retained = (masks * mass).sum((1, 2))
        best = retained[pairs.sum((1, 2)) <= budget.sum()].max()
        best_by_row = retained[(pairs.sum(2) <= budget).all(1)].max()
        for name, expected in (("best", best), ("best_row_major", best), ("best_by_row", best_by_row)):
            bound = float(bounds[name][b, h])
            assert expected <= bound + 1e-6
            if grid.tokens % BLOCK == 0:
                assert bound == pytest.approx(float(expected), abs=1e-6)
            else:
                assert bound <= expected + blocks * mass.max()


def test_the_last_selected_pair_counts_fractionally():
    mass = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    pairs = torch.tensor([10.0, 2.0, 10.0], dtype=torch.float64)
    best = lambda budget, required: float(max_mass(mass, pairs, torch.tensor(budget), torch.tensor(required)))
    none = [False] * 3
    assert best(2.0, none) == pytest.approx(0.3) and best(1.0, none) == pytest.approx(0.15)
    assert best(7.0, none) == pytest.approx(0.55) and best(22.0, none) == pytest.approx(1)
    assert best(11.0, [False, False, True]) == pytest.approx(0.2 + 0.15)


SINGLE_CALL_METHODS = [name for name, cls in METHODS.items() if not cls.reuses_outputs] + ["radial|sink", "pooled(svg)"]


@pytest.mark.parametrize("name", SINGLE_CALL_METHODS)
def test_no_method_exceeds_its_bound(name):
    """With text, a ragged block, two batch items and grouped key heads; with padding and without."""
    for lengths, density in product((None, (116, 108)), (0.3, 0.6)):
        dense, site, row_major = dense_call(GRID, BLOCK, lengths, seed=int(10 * density))
        metrics = measure_mask(Plans(method(name, density=density)), dense, site, row_major)
        assert set(metrics) == set(METRICS)
        assert all(value.shape == (4,) and value.dtype == torch.float64 for value in metrics.values())
        assert_ordered(metrics)
        assert (metrics["best_row_major"] <= 1 + 1e-9).all() and (metrics["retained"] > 0).all()


@pytest.mark.parametrize("name", ["dense", "window", "radial", "random_blocks", "sparge", "svg", "svg2", "pbs"])
def test_density_one_is_exact(name):
    dense, site, row_major = dense_call(GRID, BLOCK)
    metrics = measure_mask(Plans(method(name, density=1.0)), dense, site, row_major)
    for metric in ("density", "retained", "best", "best_by_row", "best_row_major"):
        torch.testing.assert_close(metrics[metric], torch.ones(4, dtype=torch.float64), atol=1e-6, rtol=0)
    assert (metrics["error"] < 1e-8).all()


@dataclass(frozen=True, kw_only=True)
class Oracle(METHODS["sparsed"]):
    """Keeps the blocks with the most mass in every row."""

    groups: int = 1
    rows: int | None = None


def test_an_oracle_reaches_the_bound_by_row():
    grid = Grid(4, 4, 8)  # no ragged block, no text
    dense, site, row_major = dense_call(grid, BLOCK)
    oracle = measure_mask(Plans(Oracle(density=0.5)), dense, site, row_major)
    torch.testing.assert_close(oracle["retained"], oracle["best_by_row"], atol=1e-6, rtol=0)
    random = measure_mask(Plans(method("random_blocks", density=0.5)), dense, site, row_major)
    assert (random["retained"] < random["best_by_row"] - 0.01).all()


@pytest.mark.parametrize("name, lengths", [("radial", None), ("window", None), ("svg2", None), ("radial", (116, 108))])
def test_error_is_the_relative_error_of_the_output(name, lengths):
    call, site, row_major = dense_call(GRID, BLOCK, lengths)
    one = method(name, density=0.4)
    plan = one.plan(call.q, call.k, call.k, site, {}).with_lengths(call.plan.lengths)
    everything = torch.ones(2, 4, GRID.tokens, GRID.tokens, dtype=torch.bool)
    if lengths:
        everything[1, ..., lengths[1] :] = False
    attend = partial(exact, call.q, call.k, call.v)
    (dense, _), (sparse, _) = attend(everything), attend(expanded_mask(plan))
    real = torch.ones(2, 1, GRID.tokens, 1)
    if lengths:
        real[1, :, lengths[1] :] = 0
    energy = lambda x: (x * real).square().sum((0, 2, 3))
    error = measure_mask(Plans(one), call, site, row_major)["error"]
    torch.testing.assert_close(error, energy(sparse - dense) / energy(dense), atol=1e-6, rtol=1e-3)


def test_analysis_of_the_bundled_model():
    call = {"num_inference_steps": 2, "num_frames": 4, "height": 64, "width": 64}
    stages, methods = [], ("dense", "window", "svg2")
    analysis = MaskAnalysis(methods, (0.3,), sampled_steps=1, call=call)
    result = analysis.run(lambda name: lambda *progress: stages.append((name, *progress)))
    assert stages == [("measuring masks", step, 2) for step in (1, 2)]
    assert json.loads(json.dumps(result)) == result and {"device", "versions", "commit"} <= set(result)
    assert result["steps"] == [0] and result["blocks"] == [64] and len(result["grids"]) == 1
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == list(methods) and all(row["density_asked"] == 0.3 for row in result["rows"])
    assert rows["dense"]["retained"] == rows["dense"]["efficiency"] == 1 and rows["dense"]["error"] == 0
    for name in ("window", "svg2"):
        row = rows[name]
        assert row["density"] == pytest.approx(0.3, abs=0.03)
        assert 0 < row["retained"] <= row["best_by_row"] <= row["best"] < 1 and 0 < row["error"] < 1
        assert row["efficiency"] == pytest.approx(row["retained"] / row["best"])
        for metric in (*METRICS, "efficiency"):
            table = torch.tensor(row["tables"][metric])
            assert table.shape == (6, 3), "layers and heads"
            mean = table.square().mean().sqrt() if metric == "error" else table.mean()
            assert metric == "efficiency" or float(mean) == pytest.approx(row[metric], abs=1e-4)
        texts = [text.get_text() for text in plot_efficiency(row).axes[0].texts]
        assert f"{row['tables']['efficiency'][0][0]:.2f}" in texts and len(texts) >= 6 * 3


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(methods=["nope"]), "no method 'nope'"),
        (dict(methods=[]), "no methods given"),
        (dict(methods=["radial", "radial"]), "twice"),
        (dict(methods=["cached(rettention)"]), "single calls"),
        (dict(methods=["radial"], densities=(1.5,)), "density must be in"),
        (dict(methods=["radial"], densities=()), "no densities given"),
        (dict(methods=["radial"], prompts=()), "no prompts given"),
        (dict(methods=["radial"], sampled_steps=0), "sampled_steps must be at least 1, got 0"),
        (dict(methods=["radial"], block=7), "multiple of 16"),
        (dict(methods=["radial"], schedule=Schedule(dense_steps=8)), "all 8 steps dense"),
    ],
)
def test_invalid_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        MaskAnalysis(**settings)
    assert "\n" not in str(error.value)
