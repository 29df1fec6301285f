"""Scorers against their rules, evaluated token by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attention_cases import BlockMeans, assert_near, block_sums, plan_of, qkv, softmax_map
from dit_sparse import METHODS, Above, Grid, Mass, Scorer, Site, Top, order
from dit_sparse.methods import method
from dit_sparse.methods.patterns.vdit import Vertical
from dit_sparse.methods.scorers.asa import ASA
from dit_sparse.methods.scorers.sparge import Sparge, self_similarity
from dit_sparse.methods.scorers.subblock import SubBlock
from dit_sparse.methods.scorers.xattention import XAttention
from dit_sparse.scoring import sample_positions, sample_queries

GRID = Grid(5, 7, 3, after=11)  # 116 tokens: the last block is shorter
WHOLE = Grid(4, 4, 6)  # 96 tokens: whole blocks of 16


def scores(method: Scorer, q: torch.Tensor, k: torch.Tensor, grid: Grid = GRID) -> torch.Tensor:
    return method.score(q, k, k, Site(grid, 16), {})


# --- the base class


@pytest.mark.parametrize("hilbert", [False, True], ids=["row_major", "hilbert"])
def test_batch_items_are_scored_independently(hilbert):
    grid, method = Grid(5, 7, 3, after=11), BlockMeans(density=0.6, hilbert=hilbert)
    q, k = torch.randn(2, 2, 2, grid.tokens, 8, generator=torch.Generator().manual_seed(0))
    batch = plan_of(method, grid, 16, q, k).block_mask()
    items = [plan_of(method, grid, 16, q[b : b + 1], k[b : b + 1]).block_mask() for b in range(2)]
    assert batch.equal(torch.cat(items)) and not items[0].equal(items[1])


@pytest.mark.parametrize("budget", [Top(0.3), Mass(0.7), Above(0.0)], ids=repr)
def test_the_budget_selects_from_scores_and_required_blocks(budget):
    grid, block = Grid(9, 8, 10), 32
    q, k, _ = qkv(grid.tokens, heads=4, key_heads=2)
    blocks = range(-(-grid.tokens // block))
    mean = lambda x: torch.stack([x[:, :, i * block : (i + 1) * block].mean(2) for i in blocks], 2)
    products = mean(q) @ mean(k).repeat_interleave(2, 1).mT
    expected = budget.keep(products, torch.eye(len(blocks), dtype=torch.bool))
    assert plan_of(BlockMeans(budget=budget), grid, block, q, k).block_mask().equal(expected)


def test_scores_are_computed_in_the_order_of_the_method():
    grid = Grid(4, 8, 8)
    q, k, _ = qkv(grid.tokens)
    curve = order.hilbert(grid)
    ordered = BlockMeans(density=0.3, hilbert=True).plan(q, k, k, Site(grid, 32), {})
    plain = BlockMeans(density=0.3).plan(q[:, :, curve], k[:, :, curve], k[:, :, curve], Site(grid, 32), {})
    assert ordered.block_mask().equal(plain.block_mask()) and ordered.order.equal(curve)


@pytest.mark.parametrize("budget", [Top(0.3), Mass(0.7), Above(0.0)], ids=repr)
def test_a_budget_counts_blocks_without_text(budget):
    """Text is kept in addition: the blocks of the video are chosen as without it."""
    with_text = Grid(4, 8, 8, before=32, after=40)
    q, k, _ = qkv(with_text.tokens)
    video = [x[:, :, 32 : 32 + 256] for x in (q, k)]
    keep = plan_of(BlockMeans(budget=budget), with_text, 32, q, k).block_mask()
    assert keep[..., 1:9, 1:9].equal(plan_of(BlockMeans(budget=budget), Grid(4, 8, 8), 32, *video).block_mask())
    assert keep[..., [0, 9, 10]].all() and keep[..., [0, 9, 10], :].all()


def test_the_default_budget_is_that_of_the_authors():
    grid = Grid(4, 8, 8)
    q, k, _ = qkv(grid.tokens)
    keep = lambda **settings: BlockMeans(**settings).plan(q, k, k, Site(grid, 32), {}).block_mask()
    assert keep().equal(keep(budget=Top(0.25))) and keep(density=0.25).equal(keep(budget=Top(0.25)))


@pytest.mark.parametrize("name", [name for name, cls in METHODS.items() if issubclass(cls, Scorer)])
def test_chunks_do_not_change_the_scores(name, monkeypatch):
    q, k, _ = qkv(GRID.tokens, batch=2)
    one_chunk = scores(method(name), q, k)
    monkeypatch.setattr("dit_sparse.scoring.SCORES_PER_CHUNK", 1)
    assert_near(scores(method(name), q, k), one_chunk, 1e-6)


def test_sampled_queries_are_spread_over_rows_and_columns_of_an_image():
    """Of blocks of 64 tokens in images 16 tokens wide: no two samples are in one column."""
    position = sample_positions(200, 64, 4)
    assert position.shape == (4, 4) and position.equal(position.sort(-1).values)
    first = position[0]
    assert len({*(first % 16).tolist()}) == 4 and len({*(first // 16).tolist()}) == 3
    assert position[:3].equal(first + 64 * torch.arange(3)[:, None]) and (position[3] <= 199).all()
    assert sample_positions(200, 64, 999)[1].equal(torch.arange(64, 128))
    q, _, _ = qkv(200, batch=2)
    assert sample_queries(q, 64, 4).equal(q[:, :, position])


# --- xattention


def test_xattention_with_stride_1_sums_the_attention_map():
    q, k, _ = qkv(GRID.tokens, batch=2)
    assert_near(scores(XAttention(stride=1), q, k).exp(), block_sums(softmax_map(q, k), 16), 1e-5)


def test_xattention_sums_antidiagonals():
    q, k, _ = qkv(96, dim=8)
    stride, tiles = 4, 96 // 4
    logits = q.double() @ k.double().mT
    sums = torch.zeros(*logits.shape[:2], tiles, tiles, dtype=torch.float64)
    for i in range(tiles):
        for j in range(tiles):
            tile = logits[..., i * stride : (i + 1) * stride, j * stride : (j + 1) * stride]
            sums[..., i, j] = tile.flip(-2).diagonal(dim1=-2, dim2=-1).sum(-1)
    expected = (sums / (stride * 8**0.5)).softmax(-1)
    actual = scores(XAttention(stride=stride), q, k, WHOLE)
    assert_near(actual.exp(), block_sums(expected, 16 // stride), 1e-5)


# --- subblock


def test_subblocks_of_one_token_give_the_exact_mass():
    q, k, _ = qkv(GRID.tokens, batch=2)
    logits = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    assert_near(scores(SubBlock(subblocks=16), q, k), block_sums(logits.exp(), 16).log(), 1e-5)


def test_one_subblock_gives_the_product_of_means():
    q, k, _ = qkv(96)
    means = [x.unflatten(2, (-1, 16)).mean(3) for x in (q, k)]
    expected = means[0] @ means[1].mT * q.shape[-1] ** -0.5 + torch.tensor(256.0).log()
    assert_near(scores(SubBlock(subblocks=1), q, k, WHOLE), expected, 1e-5)


# --- asa


def test_asa_with_all_tokens_finds_the_best_pair_of_blocks():
    q, k, _ = qkv(96, batch=2)
    logits = (q.double() @ k.double().mT * q.shape[-1] ** -0.5).unflatten(-1, (-1, 16)).amax(-1)
    expected = (logits - logits.amax(-1, keepdim=True)).unflatten(2, (-1, 16)).amax(3)
    assert_near(scores(ASA(samples=16), q, k, WHOLE), expected, 1e-5)


def test_asa_keeps_its_least_and_greatest_number_of_blocks():
    q, k, _ = qkv(400, dim=8)
    for top_p in (0.01, 0.999):
        budget = Mass(top_p, min_ratio=0.2, max_ratio=0.4)
        plan = plan_of(ASA(budget=budget), Grid(4, 10, 10), 16, 0.01 * q, k)
        assert ((plan.count >= 5) & (plan.count <= 10 + 1)).all()  # of 25 blocks, and the diagonal


# --- sparge


def test_self_similarity_is_the_mean_cosine():
    x, _, _ = qkv(GRID.tokens)
    for i, part in enumerate(x.split(16, 2)):
        cosine = F.cosine_similarity(part[..., :, None, :], part[..., None, :, :], dim=-1)
        assert_near(self_similarity(x, 16)[..., i], cosine.mean((-2, -1)), 1e-5)


def test_dissimilar_blocks_are_always_kept():
    generator = torch.Generator().manual_seed(0)
    x = torch.ones(1, 1, 96, 8) + 0.01 * torch.randn(1, 1, 96, 8, generator=generator)
    x[:, :, 32:48] = torch.randn(16, 8, generator=generator)
    keep = lambda threshold: plan_of(
        Sparge(similarity_threshold=threshold, hilbert=False, density=0.3), WHOLE, 16, x, x
    ).block_mask()[0, 0]
    assert keep(0.9)[2].all() and keep(0.9)[:, 2].all() and not keep(0.9).all()
    assert not keep(0.0)[2].all()


# --- sol


def test_sol_keeps_blocks_above_the_standardized_threshold():
    q, k, _ = qkv(96 * 4)
    keep = plan_of(method("sol"), Grid(4, 8, 12), 16, q, k).block_mask()
    mean = lambda x: x.double().unflatten(2, (-1, 16)).mean(3)
    queries, keys = mean(q), mean(k)
    keys = keys - keys.mean(2, keepdim=True)
    deviation = torch.einsum("bhqd,bhd->bhq", queries**2, (keys**2).mean(2)).sqrt()[..., None]
    position = torch.arange(24)
    expected = (queries @ keys.mT > 1.3 * deviation) | ((position[:, None] - position).abs() <= 1)
    assert keep.equal(expected) and not keep.all()


# --- vdit.vertical


def test_vertical_keeps_the_same_columns_for_all_queries():
    q, k, _ = qkv(512, batch=2)
    keep = plan_of(Vertical(density=0.25), Grid(8, 8, 8), 16, q, k).block_mask()
    columns = (keep & ~torch.eye(32, dtype=torch.bool)).sum(-2)
    assert ((columns == 31).sum(-1) == 7).all() and (keep.sum(-1) == 8).all()  # and the diagonal, or one more column
