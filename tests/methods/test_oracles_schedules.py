"""Selections shared by layers and outputs kept over steps, against the rules of their papers in float64."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import pytest
import torch
from oracles import BLOCK, attention_map, blocks_of, top_k, video_of
from torch import Tensor

from attention_cases import assert_near, block_sums, exact, qkv
from dit_sparse import Grid, Plan, Site
from dit_sparse.kernels.executors import reference
from dit_sparse.method import AttentionOutput, Method
from dit_sparse.methods.schedules.seqboat import SeqBoat
from dit_sparse.methods.schedules.spatten import SpAtten
from dit_sparse.methods.schedules.tidal import Tidal

GRIDS = [Grid(5, 7, 3, after=11), Grid(1, 23, 31), Grid(40, 2, 2)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: str(grid).replace(" ", ""))
LAYERS, HEADS = 6, 3


def layer_inputs(grid: Grid, layer: int, step: int = 0) -> list[Tensor]:
    """q, k and v of a layer; heads and layers attend to different keys."""
    q, k, v = qkv(grid.tokens, batch=2, heads=HEADS, dim=16, seed=layer)
    noise = qkv(grid.tokens, batch=2, heads=HEADS, dim=16, seed=100 * step + layer + 50)
    return [1.5 * q + 0.4 * step * noise[0], k, v]


def attend(one: Method, q: Tensor, k: Tensor, v: Tensor, plan: Plan, site: Site, memory: dict) -> Tensor:
    """Return the output of the method for a plan."""
    run = partial(reference.attend, q, k, v)
    result = AttentionOutput(q, k, v, plan, None, *run(plan), lambda: run(plan.full()))
    return one.correct(result, site, memory)[0]


def kept_columns(mask: Tensor, row: int, columns: list[int]) -> set[int]:
    return {column for column, keeps in enumerate(mask[row].tolist()) if keeps} & set(columns)


# --- tidal


@every_grid
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("first", [0, 2])
def test_tidal(grid, average, first):
    """Layers first, first + 3 and so on keep their own blocks with the most exact mass; those between, the selection
    of the last one. The second step starts with a new selection."""
    one, shared, blocks = Tidal(density=0.45, selection_interval=3, average_heads=average), {}, blocks_of(grid)
    video = video_of(grid, blocks)
    for step in (0, 1):
        for layer in range(first, LAYERS):
            q, k, _ = layer_inputs(grid, layer, step)
            site = Site(grid, BLOCK, layer=layer, layers=LAYERS, step=step)
            mask = one.plan(q, k, None, site, {"shared": shared}).block_mask().expand(2, HEADS, -1, -1)
            q, k, _ = layer_inputs(grid, first + (layer - first) // 3 * 3, step)
            for item in range(2):
                mass = torch.stack([block_sums(attention_map(q[item, h], k[item, h]), BLOCK) for h in range(HEADS)])
                mass = mass.mean(0, keepdim=True).expand_as(mass) if average else mass
                for head in range(HEADS):
                    for i in video:
                        kept, row = kept_columns(mask[item, head], i, video), mass[head, i].tolist()
                        assert kept == top_k({j: row[j] for j in video}, len(kept), own=i)


def test_tidal_selects_by_its_density_where_the_guard_has_changed_it():
    """A layer of another density selects for itself, and the next one reuses the old selection."""
    grid, shared, densities = Grid(1, 23, 31), {}, (0.2, 0.5, 0.2)
    plans = []
    for layer, density in enumerate(densities):
        site = Site(grid, BLOCK, layer=layer, layers=30)
        plans.append(Tidal(density=density).plan(*layer_inputs(grid, layer), site, {"shared": shared}))
        assert plans[-1].density == pytest.approx(density, abs=0.01)
    assert plans[2].block_mask().equal(plans[0].block_mask())


# --- spatten


def spatten_plans(one: SpAtten, grid: Grid, shared: dict, first: int = 1) -> list[Tensor]:
    """Return the masks of all sparse layers, ``[B, H, Qb, Qb]``."""
    masks = []
    for layer in range(first, LAYERS):
        (q, k, v), site, memory = layer_inputs(grid, layer), Site(grid, BLOCK, layer=layer, layers=LAYERS), {}
        memory["shared"] = shared
        plan = one.plan(q, k, None, site, memory)
        out = attend(one, q, k, v, plan, site, memory)
        skipped = memory["skipped"]
        if skipped is not None:
            assert not out[skipped].any() and out[~skipped].any()
        masks.append(plan.block_mask().expand(2, HEADS, -1, -1))
    return masks


@every_grid
@pytest.mark.parametrize(("slope", "shares"), [(0.5, True), (0.5, False), (0.0, False)])
def test_spatten_keys(grid, slope, shares):
    """Key blocks are ranked by the attention of all layers so far, in a softmax over the keys that are left; the
    density falls linearly over the layers. A second step starts again."""
    one = SpAtten(density=0.6, slope=slope, share_heads=shares, samples=20, seed=3)
    blocks, shared, groups = blocks_of(grid), {}, [range(HEADS)] if shares else [[head] for head in range(HEADS)]
    video, first = video_of(grid, blocks), 1
    drawn = torch.randint(grid.video, (20,), generator=torch.Generator().manual_seed(3)).tolist()
    steps = [spatten_plans(one, grid, shared, first) for _ in range(2)]
    assert all(x.equal(y) for x, y in zip(*steps, strict=True))
    for item, heads in product(range(2), groups):
        received, left = dict.fromkeys(video, 0.0), set(range(grid.tokens))
        for number, layer in enumerate(range(first, LAYERS)):
            q, k, _ = layer_inputs(grid, layer)
            for head in heads:
                logits = q[item, head, drawn].double() @ k[item, head].double().mT / 4
                gone = torch.tensor([token not in left for token in range(grid.tokens)])
                weights = logits.masked_fill(gone, -math.inf).softmax(-1).nan_to_num(0.0).sum(0)
                for j in video:
                    received[j] += float(weights[blocks[j]].sum())
            kept = [kept_columns(steps[0][number][item, heads[-1]], i, video) for i in video]
            for i, columns in zip(video, kept, strict=True):
                assert columns == top_k(received, len(columns), own=i)
            used = {j for i, columns in zip(video, kept, strict=True) for j in columns if j != i}
            left = {token for j in range(len(blocks)) if j in used or j not in video for token in blocks[j]}
    densities = [Plan.from_mask(mask, grid.tokens, BLOCK).density for mask in steps[0]]
    assert sum(densities) / len(densities) == pytest.approx(0.6, abs=0.01)
    if slope and len(video) > 9:
        expected = [0.6 * (1 + 0.5 * (1 - 2 * number / 4)) for number in range(5)]
        assert densities == pytest.approx(expected, abs=0.01)


def test_spatten_heads():
    """The last layer skips the head with the smallest outputs so far, and the other heads get its pairs."""
    grid, shared = Grid(1, 23, 31), {}
    one = SpAtten(density=0.3, slope=0.0, skipped_heads=0.4, samples=20)
    masks = spatten_plans(one, grid, shared)
    sizes = torch.zeros(2, HEADS, dtype=torch.float64)
    for layer, mask in zip(range(1, LAYERS - 1), masks, strict=False):
        q, k, v = layer_inputs(grid, layer)
        tokens = mask.repeat_interleave(BLOCK, -1).repeat_interleave(BLOCK, -2)[..., : grid.tokens, : grid.tokens]
        sizes += exact(q, k, v, tokens)[0].abs().sum((-2, -1))
    counts = masks[-1].sum(-1)
    least, blocks = sizes.argmin(-1), mask.shape[-1]
    for item in range(2):
        assert masks[-1][item, least[item]].equal(torch.eye(blocks, dtype=torch.bool))
        others = counts[item][torch.arange(HEADS) != least[item]].float().mean() / blocks
        assert float(others) == pytest.approx((3 * 0.3 - 1 / blocks) / 2, abs=0.02)
    assert all((mask.sum(-1) > 1).all() for mask in masks[:-1])
    assert Plan.from_mask(masks[-1], grid.tokens, BLOCK).density == pytest.approx(0.3, abs=0.01)


# --- seqboat


@every_grid
@pytest.mark.parametrize("observed", [True, False])
def test_seqboat(grid, observed):
    """The rows of the greatest change attend to all keys, the others have their last output, in every branch."""
    one, memory, blocks = SeqBoat(density=0.5), {}, blocks_of(grid)
    video, outputs, means = video_of(grid, blocks), {}, None
    text = [i for i in range(len(blocks)) if i not in video]
    block_means = lambda q: torch.stack([q[:, :, tokens].double().mean(2) for tokens in blocks], 2)
    for step in range(4):
        q, k, v = layer_inputs(grid, 0, step)
        plan = one.plan(q, k, None, Site(grid, BLOCK, step=step), memory)
        active = torch.zeros(2, HEADS, len(blocks), dtype=torch.bool)
        if means is None:
            active[:], means = True, block_means(q)
        else:
            assert plan.density == pytest.approx(0.5, abs=0.5 / len(video) / HEADS + 0.02)
            now = block_means(q)
            change = (now - means).square().sum(-1) / means.square().sum(-1)
            active[..., text] = True
            for item in range(2):
                for head in range(HEADS):
                    ranks = sorted(video, key=lambda i: -change[item, head, i])
                    count = int((plan.count[item, head] == len(blocks)).sum()) - len(text)
                    active[item, head, ranks[:count]] = True
            means = torch.where(active[..., None], now, means)
        rows = active.repeat_interleave(BLOCK, -1)[..., : grid.tokens, None]
        for branch, factor in (("cond", 1.0), ("uncond", -0.5)):
            site = Site(grid, BLOCK, step=step, branch=branch)
            full, _ = exact(q, k, factor * v, torch.ones(grid.tokens, grid.tokens, dtype=torch.bool))
            outputs[branch] = torch.where(rows, full, outputs.get(branch, full))
            if observed and step == 0:
                result = AttentionOutput(q, k, v, plan, None, full, None, lambda full=full: (full.float(), None))
                one.observe_dense(result, site, memory)
            else:
                assert_near(attend(one, q, k, factor * v, plan, site, memory), outputs[branch], 1e-5)


@pytest.mark.parametrize("density", [0.05, 0.3, 0.62, 1.0])
def test_seqboat_activates_as_many_rows_as_the_density_allows(density):
    """To half a row of blocks in the mean over the heads."""
    grid = Grid(6, 8, 10)
    q, k, _ = qkv(grid.tokens, heads=4, dim=8)
    plan = SeqBoat(density=density).plan(q, k, None, Site(grid, 16), {})
    assert plan.density == pytest.approx(density, abs=0.5 / (30 * 4) + 1e-6)


def test_seqboat_needs_memory_for_all_layers():
    q = torch.zeros(1, 1 << 10, 1, 1).expand(1, 1 << 10, 1 << 26, 1)
    with pytest.raises(RuntimeError, match=r"SeqBoat of 40 layers of one branch needs 10240\.00 GiB on cpu"):
        SeqBoat().begin_generation(q, Site(Grid(1, 1, 1 << 26), layers=40))
    assert SeqBoat().begin_generation(q[:, :2, :8], Site(Grid(1, 1, 8), layers=3)) == 3 * 2 * 8 * 4
