"""The best possible mask: bounds against brute force and against every method, and the analysis of a real model."""

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
from dit_sparse.eval.analysis.mask_analysis import FIGURES, Analysis, judged, picture
from dit_sparse.eval.analysis.upper_bounds import best_mass, group_mass, kept_and_best
from dit_sparse.kernels.executors import reference
from dit_sparse.method import AttentionOutput
from dit_sparse.methods import METHODS, method

GRID, BLOCK = Grid(3, 5, 7, after=11), 16  # 116 tokens: 7 whole blocks and a ragged one


def dense_call(grid: Grid, block: int, lengths=None, **given) -> tuple[AttentionOutput, Site, Tensor]:
    """A call computed densely, where it was, and its mass in row-major blocks."""
    q, k, v = qkv(grid.tokens, **{"batch": 2, "heads": 4, "key_heads": 2} | given)
    plan = Plan.dense(grid.tokens, block).with_lengths(None if lengths is None else torch.tensor(lengths))
    out, lse = reference.attend(q, k, v, plan)
    done = AttentionOutput(q, k, v, plan, None, out, lse, lambda: (out, lse))
    return done, Site(grid, block), group_mass(q, k, lse, plan)


def weights(done: AttentionOutput) -> Tensor:
    """The attention itself, float64 ``[B, H, N, N]``; rows of padding are left out of all means."""
    q, k = done.q.double(), done.k.double().repeat_interleave(done.q.shape[1] // done.k.shape[1], 1)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if done.plan.lengths is None:
        return scores.softmax(-1) / q.shape[2]
    real = (torch.arange(q.shape[2]) < done.plan.lengths[:, None])[:, None]
    found = scores.masked_fill(~real[..., None, :], -torch.inf).softmax(-1)
    return found * real[..., None] / done.plan.lengths[:, None, None, None]


def token_map(plan) -> Tensor:
    return (cluster_token_mask if isinstance(plan, ClusterPlan) else token_mask)(plan, 2, 4)


PLANS = {
    "row-major": lambda: random_plan(GRID.tokens, BLOCK, batch=2, heads=4),
    "ordered": lambda: random_plan(GRID.tokens, BLOCK, heads=4, order=torch.randperm(GRID.tokens)),
    "orders of its own": lambda: random_plan(
        GRID.tokens, BLOCK, batch=2, heads=4, order=torch.rand(2, 4, GRID.tokens).argsort(-1)
    ),
    "padded": lambda: random_plan(GRID.tokens, BLOCK, batch=2, heads=4, lengths=(116, 106)),
    "clusters": lambda: random_cluster_plan(GRID.tokens, batch=2, heads=4),
    "padded clusters": lambda: random_cluster_plan(GRID.tokens, batch=2, heads=4, lengths=(116, 106)),
}


@pytest.mark.parametrize("name", PLANS)
def test_group_mass_and_retained_are_sums_of_attention(name):
    plan = PLANS[name]()
    done, site, row_major = dense_call(GRID, BLOCK, None if plan.lengths is None else plan.lengths.tolist())
    mass, attention = group_mass(done.q, done.k, done.lse, plan), weights(done)
    rows, columns = (g.expand(2, 4, -1) for g in (plan.query_group, plan.key_group))
    for b, h in product(range(2), range(4)):
        expected = torch.zeros(mass.shape[2:], dtype=torch.float64)
        at = rows[b, h][:, None] * mass.shape[3] + columns[b, h]
        expected.view(-1).index_add_(0, at.flatten(), attention[b, h].flatten())
        torch.testing.assert_close(mass[b, h], expected, atol=1e-6, rtol=1e-4)
    found = kept_and_best(done, plan, site, row_major)
    retained = (attention * token_map(plan)).sum((-2, -1))
    torch.testing.assert_close(found["retained"], retained, atol=1e-6, rtol=1e-4)
    assert (found["retained"] <= found["best_by_row"] + 1e-9).all()
    assert (found["best_by_row"] <= found["best"] + 1e-9).all() and (found["best"] <= 1 + 1e-9).all()


def every_mask(blocks: int) -> Tensor:
    """All block maps, ``[2 ** (blocks * blocks), blocks, blocks]``."""
    number = torch.arange(2 ** (blocks * blocks))
    return (number[:, None] >> torch.arange(blocks * blocks) & 1).bool().view(-1, blocks, blocks)


@pytest.mark.parametrize("grid", [Grid(3, 4, 4), Grid(2, 4, 4, after=16), Grid(3, 4, 4, after=3)], ids=str)
def test_the_bounds_are_the_best_of_all_masks(grid):
    """Equal where blocks are equal; where one is ragged no mask exceeds them, and some comes within a block."""
    done, site, row_major = dense_call(grid, BLOCK, heads=2, key_heads=2)
    plan = method("random_blocks", density=0.4, seed=3).plan(done.q, done.k, site, {})
    found, attention, blocks = kept_and_best(done, plan, site, row_major), weights(done), plan.blocks
    group = torch.arange(grid.tokens) // BLOCK
    size = torch.bincount(group).double()
    keep, masks = plan.block_mask().expand(2, 2, -1, -1), every_mask(blocks)
    text = [bool((group[grid.video :] == b).any()) for b in range(blocks)]
    always = torch.eye(blocks, dtype=torch.bool) | torch.tensor(text)[:, None] | torch.tensor(text)
    masks = masks[masks[:, always].all(1)].double()
    pairs = masks * size[:, None] * size
    for b, h in product(range(2), range(2)):
        spent = (keep[b, h] * size[:, None] * size).sum(-1)
        mass = torch.zeros(blocks, blocks, dtype=torch.float64)
        mass.view(-1).index_add_(0, (group[:, None] * blocks + group).flatten(), attention[b, h].flatten())
        of_all = (masks * mass).sum((1, 2))
        free = of_all[pairs.sum((1, 2)) <= spent.sum()].max()
        by_row = of_all[(pairs.sum(2) <= spent).all(1)].max()
        for name, brute in (("best", free), ("best_row_major", free), ("best_by_row", by_row)):
            bound = float(found[name][b, h])
            assert brute <= bound + 1e-6
            if grid.tokens % BLOCK == 0:
                assert bound == pytest.approx(float(brute), abs=1e-6)
            else:
                assert bound <= brute + blocks * mass.max()


def test_the_last_pair_counts_in_part():
    mass = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    pairs = torch.tensor([10.0, 2.0, 10.0], dtype=torch.float64)
    bought = lambda budget, forced: float(best_mass(mass, pairs, torch.tensor(budget), torch.tensor(forced)))
    nothing = [False] * 3
    assert bought(2.0, nothing) == pytest.approx(0.3) and bought(1.0, nothing) == pytest.approx(0.15)
    assert bought(7.0, nothing) == pytest.approx(0.55) and bought(22.0, nothing) == pytest.approx(1)
    assert bought(11.0, [False, False, True]) == pytest.approx(0.2 + 0.15)


SINGLE = [name for name in METHODS if name != "rettention"] + ["radial|sink", "pooled(svg)"]


@pytest.mark.parametrize("name", SINGLE)
def test_no_method_exceeds_its_bound(name):
    """Text, a ragged block, two batch items, fewer key heads; with padding and without."""
    for lengths, density in product((None, (116, 108)), (0.3, 0.6)):
        done, site, row_major = dense_call(GRID, BLOCK, lengths, seed=int(10 * density))
        found = judged(Plans(method(name, density=density)), done, site, row_major)
        assert set(found) == set(FIGURES) and all(x.shape == (4,) and x.dtype == torch.float64 for x in found.values())
        assert (found["retained"] <= found["best_by_row"] + 1e-9).all()
        assert (found["best_by_row"] <= found["best"] + 1e-9).all()
        assert (found["best"] <= 1 + 1e-9).all() and (found["best_row_major"] <= 1 + 1e-9).all()
        assert (found["retained"] > 0).all()


@pytest.mark.parametrize("name", ["dense", "window", "radial", "random_blocks", "sparge", "svg", "svg2", "pbs"])
def test_at_density_one_nothing_is_missing(name):
    done, site, row_major = dense_call(GRID, BLOCK)
    found = judged(Plans(method(name, density=1.0)), done, site, row_major)
    for figure in ("density", "retained", "best", "best_by_row", "best_row_major"):
        torch.testing.assert_close(found[figure], torch.ones(4, dtype=torch.float64), atol=1e-6, rtol=0)
    assert (found["error"] < 1e-8).all()


@dataclass(frozen=True, kw_only=True)
class Oracle(METHODS["sparsed"]):
    """Keeps the heaviest blocks of every row, exactly."""

    groups: int = 1
    rows: int | None = None


def test_a_method_that_knows_all_reaches_the_bound_of_its_rows():
    grid = Grid(4, 4, 8)  # whole blocks, no text
    done, site, row_major = dense_call(grid, BLOCK)
    found = judged(Plans(Oracle(density=0.5)), done, site, row_major)
    torch.testing.assert_close(found["retained"], found["best_by_row"], atol=1e-6, rtol=0)
    blind = judged(Plans(method("random_blocks", density=0.5)), done, site, row_major)
    assert (blind["retained"] < blind["best_by_row"] - 0.01).all()


@pytest.mark.parametrize("name, lengths", [("radial", None), ("window", None), ("svg2", None), ("radial", (116, 108))])
def test_the_error_is_that_of_the_output(name, lengths):
    done, site, row_major = dense_call(GRID, BLOCK, lengths)
    one = method(name, density=0.4)
    plan = one.plan(done.q, done.k, site, {}).with_lengths(done.plan.lengths)
    everything = torch.ones(2, 4, GRID.tokens, GRID.tokens, dtype=torch.bool)
    if lengths:
        everything[1, ..., lengths[1] :] = False
    attend = partial(exact, done.q, done.k, done.v)
    (dense, _), (sparse, _) = attend(everything), attend(token_map(plan))
    real = torch.ones(2, 1, GRID.tokens, 1)
    if lengths:
        real[1, :, lengths[1] :] = 0
    energy = lambda x: (x * real).square().sum((0, 2, 3))
    found = judged(Plans(one), done, site, row_major)["error"]
    torch.testing.assert_close(found, energy(sparse - dense) / energy(dense), atol=1e-6, rtol=1e-3)


def test_the_bundled_model_is_analysed():
    call = {"num_inference_steps": 2, "num_frames": 4, "height": 64, "width": 64}
    stages, methods = [], ("dense", "window", "svg2")
    result = Analysis(methods, (0.3,), looks=1, call=call).run(lambda name: lambda *at: stages.append((name, *at)))
    assert stages == [("analysing", step, 2) for step in (1, 2)]
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
        for figure in (*FIGURES, "efficiency"):
            table = torch.tensor(row["tables"][figure])
            assert table.shape == (6, 3), "layers and heads"
            mean = table.square().mean().sqrt() if figure == "error" else table.mean()
            assert figure == "efficiency" or float(mean) == pytest.approx(row[figure], abs=1e-4)
        drawn = picture(row)
        assert drawn.width > drawn.height > 6 * 34


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(methods=["nope"]), "no method 'nope'"),
        (dict(methods=[]), "no methods"),
        (dict(methods=["radial", "radial"]), "twice"),
        (dict(methods=["cached(rettention)"]), "single calls"),
        (dict(methods=["radial"], densities=(1.5,)), "density is the fraction"),
        (dict(methods=["radial"], densities=()), "no densities"),
        (dict(methods=["radial"], prompts=()), "no prompts"),
        (dict(methods=["radial"], looks=0), "at least 1"),
        (dict(methods=["radial"], block=7), "multiple of 16"),
        (dict(methods=["radial"], schedule=Schedule(dense_steps=8)), "all 8 steps dense"),
    ],
)
def test_bad_input_is_one_sentence(given, words):
    with pytest.raises(ValueError, match=words) as error:
        Analysis(**given)
    assert "\n" not in str(error.value)
