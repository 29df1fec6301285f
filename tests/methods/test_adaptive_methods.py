"""Methods that search a mask or choose a pattern for each head, against their rules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attention_cases import assert_near, block_sums, plan_of, qkv, softmax_map, token_mask
from dit_sparse import Grid, Site, order
from dit_sparse.kernels.planning.block_mass import block_mass, log_sum_exp
from dit_sparse.methods.patterns.svg import SVG, Band
from dit_sparse.methods.patterns.vdit import VDiT
from dit_sparse.methods.schedules.adaspa import AdaSpa
from dit_sparse.methods.schedules.sparsed import SparseD

GRID = Grid(5, 7, 3, after=11)  # 116 tokens: the last block is shorter


# --- adaspa


def test_log_sum_exp_is_exact():
    q, k, _ = qkv(GRID.tokens, batch=2, heads=4, key_heads=2)
    logits = q.double() @ k.double().repeat_interleave(2, 1).mT
    for scale in (None, 0.3):
        expected = (logits * (q.shape[-1] ** -0.5 if scale is None else scale)).logsumexp(-1)
        assert_near(log_sum_exp(q, k, scale), expected, 1e-6)


def test_adaspa_keeps_the_blocks_with_the_most_mass():
    q, k, _ = qkv(96, batch=2, dim=8)
    exact = block_sums(softmax_map(q, k), 16)
    mass = block_mass(q, k, log_sum_exp(q, k), 16)
    assert_near(mass, exact / 16, 1e-5)
    assert_near(mass.sum(-1), torch.ones_like(mass[..., 0]), 1e-5)
    keep = plan_of(AdaSpa(density=0.5, head_adaptive=False), Grid(4, 4, 6), 16, q, k).block_mask()
    diagonal = torch.eye(6, dtype=torch.bool)
    best = exact.masked_fill(diagonal, torch.inf).topk(3, dim=-1).indices
    assert keep.equal(torch.zeros_like(exact, dtype=torch.bool).scatter(-1, best, True))


def test_adaspa_has_three_densities_with_an_unchanged_mean():
    """Two heads attend to one block each, one to everything: the first two hold most of their mass. The second batch
    item has its heads in reverse order."""
    generator = torch.Generator().manual_seed(0)
    blocks = F.one_hot(torch.arange(320) // 16, 20).float()
    q = torch.stack([40 * blocks, 30 * blocks, 0 * blocks, 2 * torch.randn(320, 20, generator=generator)])
    k = torch.stack([blocks, blocks, blocks, torch.randn(320, 20, generator=generator)])
    q, k = torch.stack([q, q.flip(0)]), torch.stack([k, k.flip(0)])
    for density, few, many in ((0.2, 2, 6), (0.5, 5, 15)):
        count = AdaSpa(density=density).plan(q, k, k, Site(Grid(4, 8, 10), 16), {}).count.float().mean(-1)
        assert count.tolist() == [[few, few, many, many], [many, many, few, few]] and count.mean() == 20 * density
    assert (AdaSpa(density=0.8).plan(q, k, k, Site(Grid(4, 8, 10), 16), {}).count == 16).all(), "too dense for levels"


def test_adaspa_reuses_the_first_log_sum_exp():
    q, k, _ = qkv(GRID.tokens)
    memory = {}
    first = AdaSpa(density=0.3).plan(q, k, k, Site(GRID, 16), memory)
    lse = memory["lse"].clone()
    second = AdaSpa(density=0.3).plan(q * 1.01, k, k, Site(GRID, 16, step=7), memory)
    assert memory["lse"].equal(lse) and second.count.equal(first.count)


# --- sparsed


@pytest.mark.parametrize("groups", [1, 3])
def test_sparsed_plans_once_and_keeps_the_best_blocks_of_every_group(groups):
    grid = Grid(6, 8, 8)  # 24 blocks of 16
    q, k, _ = qkv(grid.tokens, batch=2, dim=16)
    k[:, :, :128] *= 3  # the first frames receive nearly all attention
    memory, method = {}, SparseD(density=0.25, groups=groups)  # six of 24, or two of eight
    plan = method.plan(q, k, k, Site(grid, 16), memory)
    exact = block_sums(softmax_map(q, k), 16).masked_fill(torch.eye(24, dtype=torch.bool), torch.inf)
    for group, keep in zip(exact.chunk(groups, -1), plan.block_mask().chunk(groups, -1), strict=True):
        best = group.topk(6 // groups, dim=-1).indices
        assert keep.equal(torch.zeros_like(group, dtype=torch.bool).scatter(-1, best, True))
    assert method.plan(k, q, q, Site(grid, 16, step=9), memory) is plan
    assert method.plan(k, q, q, Site(grid, 16), {}) is not plan


# --- svg


def test_svg_finds_temporal_heads():
    """One head attends to its own frame, one to its own place in every frame."""
    grid, block = Grid(8, 6, 8), 16
    frame, row, column, _ = grid.coordinates()
    same_frame, same_place = F.one_hot(frame, 8).float(), F.one_hot(row * 8 + column, 48).float()
    heads = torch.stack([F.pad(same_frame, (0, 40)), same_place])[None]
    plan = SVG(density=0.25).plan(90 * heads, heads, heads, Site(grid, block), {})
    assert plan.order.shape == (1, 2, grid.tokens)
    assert plan.order[0, 0].equal(order.row_major(grid)) and plan.order[0, 1].equal(order.frame_last(grid))
    assert plan.block_mask().equal(Band(density=0.25).block_mask(grid, block)[None, None])
    assert ((softmax_map(90 * heads, heads) * token_mask(plan, 1, 2)).sum(-1) > 0.9).all()


def test_svg_samples_the_whole_sequence():
    grid = Grid(8, 6, 8, before=20)
    q = torch.zeros(1, 1, grid.tokens, 8)
    keys = []
    spy = q.as_subclass(
        type("Spy", (torch.Tensor,), {"__getitem__": lambda x, i: keys.append(i) or torch.Tensor.__getitem__(x, i)})
    )
    SVG(density=0.3, samples=500).plan(spy, q, q, Site(grid, 16), {})
    rows = next(i[2] for i in keys if isinstance(i, tuple) and isinstance(i[2], torch.Tensor))
    assert rows.min() >= 20 and rows.min() < 30 and rows.max() > grid.tokens - 10


# --- vdit


def test_vdit_finds_the_mode_of_every_head_and_keeps_it():
    """One head attends to its own frame, one to its own place, one to two columns of blocks."""
    grid = Grid(8, 8, 8)
    frame, row, column, _ = grid.coordinates()
    frames, places = F.one_hot(frame, 64).float(), F.one_hot(row * 8 + column, 64).float()
    queries = torch.zeros(512, 64).index_fill(1, torch.tensor([0]), 1.0)
    stripe = torch.zeros(512, 64)
    stripe[64:80], stripe[256:272] = queries[:16], queries[:16]
    q, k = torch.stack([frames, places, queries])[None] * 40, torch.stack([frames, places, stripe])[None]
    memory, method = {}, VDiT(density=0.25)
    plan = method.plan(q, k, k, Site(grid, 16), memory)
    mask = token_mask(plan, 1, 3)[0]
    assert mask[0][frame[:, None] == frame].all()
    same_place = (row * 8 + column)[:, None] == row * 8 + column
    assert mask[1][same_place].all() and not mask[0][same_place].all()
    assert mask[2][:, 64:80].all() and mask[2][:, 256:272].all()
    assert method.plan(k, q, q, Site(grid, 16, step=5), memory) is plan
