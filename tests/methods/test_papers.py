"""Every paper's rule against the rule written out token by token."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from attention_cases import assert_near, grids, plan_of, qkv
from dit_sparse import Grid, Mass, Site, attention, order
from dit_sparse.kernels.planning.block_mass import block_mass, log_sum_exp
from dit_sparse.kernels.planning.cluster import kmeans
from dit_sparse.methods import method
from dit_sparse.methods.adaspa import AdaSpa
from dit_sparse.methods.asa import ASA
from dit_sparse.methods.neighborhood import Neighborhood, neighbors, sliding_tile
from dit_sparse.methods.pbs import PBS
from dit_sparse.methods.sparge import Sparge, self_similarity
from dit_sparse.methods.sparsed import SparseD
from dit_sparse.methods.subblock import SubBlock
from dit_sparse.methods.svg import SVG, Band
from dit_sparse.methods.svg2 import SVG2
from dit_sparse.methods.xattention import XAttention

GRID = Grid(5, 7, 3, after=11)  # 116 tokens: a ragged end for every block
TOKENS = GRID.tokens


def weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The whole attention map ``[B, H, N, N]``, in float64."""
    return (q.double() @ k.double().mT * q.shape[-1] ** -0.5).softmax(-1)


def block_sums(table: torch.Tensor, block: int) -> torch.Tensor:
    short = -table.shape[-1] % block
    table = F.pad(table, (0, short, 0, short))
    return table.unflatten(-1, (-1, block)).sum(-1).unflatten(-2, (-1, block)).sum(-2)


def scores(what, q, k, block=16, grid=GRID) -> torch.Tensor:
    return what.score(q, k, Site(grid, block), {})


# --- exact where the finest setting makes them exact


def test_xattention_with_stride_1_adds_up_the_attention_map():
    q, k, _ = qkv(TOKENS, batch=2)
    assert_near(scores(XAttention(stride=1), q, k).exp(), block_sums(weights(q, k), 16), 1e-5)


def test_xattention_sums_antidiagonals():
    """Tile by tile, without the reshaping."""
    q, k, _ = qkv(96, dim=8)
    stride, tiles = 4, 96 // 4
    logits = q.double() @ k.double().mT
    sums = torch.zeros(*logits.shape[:2], tiles, tiles, dtype=torch.float64)
    for i in range(tiles):
        for j in range(tiles):
            tile = logits[..., i * stride : (i + 1) * stride, j * stride : (j + 1) * stride]
            sums[..., i, j] = tile.flip(-2).diagonal(dim1=-2, dim2=-1).sum(-1)
    expected = (sums / (stride * 8**0.5)).softmax(-1)
    found = scores(XAttention(stride=stride), q, k, grid=Grid(4, 4, 6))
    assert_near(found.exp(), block_sums(expected, 16 // stride), 1e-5)


def test_subblock_with_a_part_a_token_is_the_exact_mass():
    q, k, _ = qkv(TOKENS, batch=2)
    logits = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    assert_near(scores(SubBlock(subblocks=16), q, k), block_sums(logits.exp(), 16).log(), 1e-5)


def test_subblock_with_one_part_is_the_product_of_means():
    q, k, _ = qkv(96)
    means = [x.unflatten(2, (-1, 16)).mean(3) for x in (q, k)]
    expected = means[0] @ means[1].mT * q.shape[-1] ** -0.5 + torch.tensor(256.0).log()
    assert_near(scores(SubBlock(subblocks=1), q, k, grid=Grid(4, 4, 6)), expected, 1e-5)


def test_asa_of_every_token_is_the_best_of_every_block():
    q, k, _ = qkv(96, batch=2)
    logits = (q.double() @ k.double().mT * q.shape[-1] ** -0.5).unflatten(-1, (-1, 16)).amax(-1)
    expected = (logits - logits.amax(-1, keepdim=True)).unflatten(2, (-1, 16)).amax(3)
    assert_near(scores(ASA(samples=16), q, k, grid=Grid(4, 4, 6)), expected, 1e-5)


def test_asa_keeps_no_fewer_and_no_more_than_it_may():
    q, k, _ = qkv(400, dim=8)
    for share in (0.01, 0.999):
        plan = plan_of(ASA(budget=Mass(share, min_ratio=0.2, max_ratio=0.4)), Grid(4, 10, 10), 16, 0.01 * q, k)
        assert ((plan.count >= 5) & (plan.count <= 10 + 1)).all()  # 25 blocks, and their own


@pytest.mark.parametrize("name", ["xattention", "asa", "subblock", "sparge"])
def test_chunks_change_nothing(name, monkeypatch):
    q, k, _ = qkv(TOKENS, batch=2)
    whole = scores(method(name), q, k)
    monkeypatch.setattr("dit_sparse.scoring.SCORES_PER_CHUNK", 1)
    assert_near(scores(method(name), q, k), whole, 1e-6)


# --- sparge


def test_self_similarity_is_the_mean_cosine():
    x, _, _ = qkv(TOKENS)
    for i, part in enumerate(x.split(16, 2)):
        cosine = F.cosine_similarity(part[..., :, None, :], part[..., None, :, :], dim=-1)
        assert_near(self_similarity(x, 16)[..., i], cosine.mean((-2, -1)), 1e-5)


def test_what_is_not_alike_is_computed_anyway():
    generator = torch.Generator().manual_seed(0)
    x = torch.ones(1, 1, 96, 8) + 0.01 * torch.randn(1, 1, 96, 8, generator=generator)
    x[:, :, 32:48] = torch.randn(16, 8, generator=generator)
    keep = plan_of(Sparge(similarity_threshold=0.9, hilbert=False, density=0.3), Grid(4, 4, 6), 16, x, x).block_mask()[
        0, 0
    ]
    assert keep[2].all() and keep[:, 2].all() and not keep.all()
    assert not plan_of(Sparge(hilbert=False, density=0.3), Grid(4, 4, 6), 16, x, x).block_mask()[0, 0, 2].all()


# --- adaspa


def test_log_sum_exp_is_what_it_says():
    q, k, _ = qkv(TOKENS, batch=2, heads=4, key_heads=2)
    logits = q.double() @ k.double().repeat_interleave(2, 1).mT
    for scale in (None, 0.3):
        expected = (logits * (q.shape[-1] ** -0.5 if scale is None else scale)).logsumexp(-1)
        assert_near(log_sum_exp(q, k, scale), expected, 1e-6)


def test_adaspa_ranks_by_the_exact_map():
    """Its block sums total one a query, and every row keeps its heaviest."""
    q, k, _ = qkv(96, batch=2, dim=8)
    exact = block_sums(weights(q, k), 16)
    found = block_mass(q, k, log_sum_exp(q, k), 16)
    assert_near(found, exact / 16, 1e-5)
    assert_near(found.sum(-1), torch.ones_like(found[..., 0]), 1e-5)
    keep = plan_of(AdaSpa(density=0.5, head_adaptive=False), Grid(4, 4, 6), 16, q, k).block_mask()
    own = torch.eye(6, dtype=torch.bool)
    best = exact.masked_fill(own, torch.inf).topk(3, dim=-1).indices
    assert keep.equal(torch.zeros_like(exact, dtype=torch.bool).scatter(-1, best, True))


def test_adaspa_gives_heads_three_levels_at_an_unchanged_mean():
    """Two heads look at one block each, one at everything: the first two hold most of their mass. The other item of the
    batch has its heads the other way round."""
    generator = torch.Generator().manual_seed(0)
    places = F.one_hot(torch.arange(320) // 16, 20).float()
    q = torch.stack([40 * places, 30 * places, 0 * places, 2 * torch.randn(320, 20, generator=generator)])
    k = torch.stack([places, places, places, torch.randn(320, 20, generator=generator)])
    q, k = torch.stack([q, q.flip(0)]), torch.stack([k, k.flip(0)])
    for density, few, many in ((0.2, 2, 6), (0.5, 5, 15)):
        count = AdaSpa(density=density).plan(q, k, Site(Grid(4, 8, 10), 16), {}).count.float().mean(-1)
        assert count.tolist() == [[few, few, many, many], [many, many, few, few]] and count.mean() == 20 * density
    assert (AdaSpa(density=0.8).plan(q, k, Site(Grid(4, 8, 10), 16), {}).count == 16).all(), "too dense for levels"


def test_adaspa_keeps_the_first_log_sum_exp():
    q, k, _ = qkv(TOKENS)
    memory = {}
    first = AdaSpa(density=0.3).plan(q, k, Site(GRID, 16), memory)
    kept = memory["lse"].clone()
    again = AdaSpa(density=0.3).plan(q * 1.01, k, Site(GRID, 16, step=7), memory)
    assert memory["lse"].equal(kept) and again.count.equal(first.count)


# --- sparsed


def test_sparsed_chooses_once_and_from_every_group():
    grid = Grid(6, 8, 8)  # 24 blocks of 16, in three groups of eight
    q, k, _ = qkv(grid.tokens, batch=2, dim=16)
    k[:, :, :128] *= 3  # the first frames draw nearly all attention
    memory, what = {}, SparseD(density=0.3)  # of eight, two
    plan = what.plan(q, k, Site(grid, 16), memory)
    exact = block_sums(weights(q, k), 16)
    own = torch.eye(24, dtype=torch.bool)
    for group in (slice(0, 8), slice(8, 16), slice(16, 24)):
        part = exact.masked_fill(own, torch.inf)[..., group]
        expected = torch.zeros_like(part, dtype=torch.bool).scatter(-1, part.topk(2, dim=-1).indices, True)
        assert plan.block_mask()[..., group].equal(expected)
    assert what.plan(k, q, Site(grid, 16, step=9), memory) is plan
    assert what.plan(k, q, Site(grid, 16), {}) is not plan


# --- svg


def test_svg_sees_which_heads_are_temporal():
    """One head attends to its own frame, one to its own place in every frame."""
    grid, block = Grid(8, 6, 8), 16
    frame, row, column, _ = grid.coordinates()
    same_frame, same_place = F.one_hot(frame, 8).float(), F.one_hot(row * 8 + column, 48).float()
    heads = torch.stack([F.pad(same_frame, (0, 40)), same_place])[None]
    plan = SVG(density=0.25).plan(90 * heads, heads, Site(grid, block), {})
    assert plan.order.shape == (1, 2, grid.tokens)
    assert plan.order[0, 0].equal(order.row_major(grid)) and plan.order[0, 1].equal(order.frame_last(grid))
    assert plan.block_mask().equal(Band(density=0.25).block_mask(grid, block)[None, None])
    kept = torch.take_along_dim(plan.block_mask().expand(1, 2, -1, -1), plan.query_group[..., None], 2)
    kept = torch.take_along_dim(kept, plan.key_group[..., None, :], 3)
    assert ((weights(90 * heads, heads) * kept).sum(-1) > 0.9).all()


def test_svg_samples_the_whole_sequence():
    grid = Grid(8, 6, 8, before=20)
    q = torch.zeros(1, 1, grid.tokens, 8)
    seen = []
    q_spy = q.as_subclass(
        type("Spy", (torch.Tensor,), {"__getitem__": lambda x, i: seen.append(i) or torch.Tensor.__getitem__(x, i)})
    )
    SVG(density=0.3, samples=500).plan(q_spy, q, Site(grid, 16), {})
    rows = next(i[2] for i in seen if isinstance(i, tuple) and isinstance(i[2], torch.Tensor))
    assert rows.min() >= 20 and rows.min() < 30 and rows.max() > grid.tokens - 10


# --- svg2


def test_svg2_with_a_cluster_a_token_is_dense():
    """Every token its own cluster and all of the mass: nothing is left out, and the estimate is the attention map."""
    q, k, v = qkv(TOKENS, batch=2, dim=16)
    what = SVG2(query_clusters=10**6, key_clusters=10**6, top_p=1.0)
    out, lse = attention(q, k, v, grid=GRID, method=what, executor="gather")
    assert_near(out, F.scaled_dot_product_attention(q, k, v), 1e-3)
    assert_near(lse, log_sum_exp(q, k), 1e-3)


@pytest.mark.parametrize("grid", [Grid(4, 16, 24), Grid(4, 16, 24, after=33), Grid(4, 16, 24, before=33)], ids=str)
@pytest.mark.parametrize("density", [0.15, 0.25, 0.5])
def test_svg2_meets_the_density_to_a_cluster(grid, density):
    q, k, _ = qkv(grid.tokens, batch=2, dim=16)
    plan = SVG2(init_iterations=5, density=density).plan(q, k, Site(grid), {})
    text = grid.before + grid.after
    asked = density + (1 - density) * text / grid.tokens  # rows of text are dense
    assert plan.density == pytest.approx(asked, abs=0.01)


def test_svg2_keeps_the_fewest_clusters_that_reach_the_share():
    q, k, _ = qkv(GRID.tokens, dim=16)
    grid = Grid(4, 29, 1)
    memory = {}
    plan = SVG2(query_clusters=150, key_clusters=281, top_p=0.7, min_ratio=0.0, init_iterations=5).plan(
        q, k, Site(grid), memory
    )
    centers = [memory[f"{side} centroids"].double() for side in ("query", "key")]
    mass = (centers[0] @ centers[1].mT / 4).exp() * plan.keys.sizes[..., None, :]
    mass = mass / mass.sum(-1, keepdim=True)
    keep = plan.block_mask()
    kept = (mass * keep).sum(-1)
    least = mass.masked_fill(~keep, torch.inf).amin(-1)
    assert (kept >= 0.7 - 1e-6).all() and (kept - least < 0.7).all()
    assert (least >= mass.masked_fill(keep, 0).amax(-1)).all(), "what is kept is the heaviest"


def test_svg2_starts_from_the_centroids_of_the_step_before():
    q, k, _ = qkv(GRID.tokens, batch=2, dim=16)
    grid, memory, what = (
        Grid(4, 29, 1),
        {},
        SVG2(query_clusters=150, key_clusters=281, init_iterations=3, iterations=1, density=0.3),
    )
    first = what.plan(q, k, Site(grid), memory)
    before = {name: x.clone() for name, x in memory.items()}
    again = what.plan(q, k, Site(grid, step=1), memory)
    clusters, centroids = kmeans(k, 11, 1, before["key centroids"])
    assert memory["key centroids"].equal(centroids) and again.keys.order.equal(clusters.order)
    alone = [what.plan(q[b : b + 1], k[b : b + 1], Site(grid), {}) for b in range(2)]
    assert all(one.block_mask().equal(first.block_mask()[b : b + 1]) for b, one in enumerate(alone))


# --- pbs


@pytest.mark.parametrize("grid", [Grid(4, 16, 24), Grid(4, 16, 24, after=33), Grid(4, 16, 24, before=33)], ids=str)
@pytest.mark.parametrize("density", [0.15, 0.25, 0.5])
def test_pbs_meets_the_density_to_a_block(grid, density):
    q, k, _ = qkv(grid.tokens, batch=2, dim=16)
    plan = PBS(density=density).plan(q, k, Site(grid, 32), {})
    text = grid.before + grid.after
    assert plan.density == pytest.approx(density + (1 - density) * text / grid.tokens, abs=0.01)


def test_pbs_brings_the_keys_together_that_everyone_wants():
    """Sixteen keys, spread over the video, hold nearly all attention: they are one block."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 320, 16, generator=generator)
    wanted = torch.randperm(320, generator=generator)[:16]
    q[..., 0], k[..., 0] = 8.0, 0.0
    k[:, :, wanted, 0] = 8.0
    plan = PBS(top_p=0.9, segment_blocks=20).plan(q, k, Site(Grid(5, 8, 8), 16), {})
    assert plan.keys.order[..., :16].sort(-1).values.equal(wanted.sort().values.expand(1, 2, -1))
    assert plan.queries.order.flatten().equal(torch.arange(320))


def test_pbs_sorts_inside_segments_and_ranks_exactly():
    grid = Grid(4, 8, 10)  # 20 blocks of 16, in five segments of four
    q, k, _ = qkv(grid.tokens, batch=2, dim=16)
    plan = PBS(density=0.3, segment_blocks=4, probe_queries=320, queries_per_block=16).plan(q, k, Site(grid, 16), {})
    segment = torch.arange(320) // 64
    assert (plan.keys.order // 64).equal(segment.expand(2, 2, -1))
    received = weights(q, k).mean(2)
    ranked = torch.take_along_dim(received, plan.keys.order, -1).unflatten(-1, (5, 4, 16))
    assert (ranked[:, :, :, :-1].amin(-1) >= ranked[:, :, :, 1:].amax(-1) - 1e-6).all()
    mass = torch.take_along_dim(weights(q, k), plan.keys.order[:, :, None], -1)
    own = torch.arange(20)[:, None] // 4 == torch.arange(20) // 4
    best = block_sums(mass, 16).masked_fill(own, torch.inf).topk(6, dim=-1).indices
    assert plan.block_mask().equal(torch.zeros(2, 2, 20, 20, dtype=torch.bool).scatter(-1, best, True))


def test_pbs_counts_its_own_segment_in_the_share():
    """Queries that look into their own segment alone have all they want there."""
    places = F.one_hot(torch.arange(320) // 32, 10).float()
    noise = 0.3 * torch.randn(2, 1, 2, 320, 22, generator=torch.Generator().manual_seed(0))
    q, k = (torch.cat([7 * places.expand(1, 2, -1, -1), part], -1) for part in noise)
    assert PBS(top_p=0.9).plan(q, k, Site(Grid(5, 8, 8), 16), {}).density == pytest.approx(0.1)


def test_pbs_sorts_long_sequences_exactly():
    """An importance is about one over the length, and has to count beside the number of a segment."""
    grid = Grid(30, 32, 32)
    q, k, _ = qkv(grid.tokens, heads=1, dim=8)
    plan = PBS(density=0.05, probe_queries=16).plan(q, k, Site(grid, 128), {})
    received = (q[:, :, :: grid.tokens // 16].double() @ k.double().mT * 8**-0.5).softmax(-1).mean(2)
    ranked = torch.take_along_dim(received, plan.keys.order, -1).unflatten(-1, (-1, 2, 128))
    assert (ranked[..., 0, :].amin(-1) >= ranked[..., 1, :].amax(-1) * (1 - 1e-5)).all()


# --- neighborhood


@given(st.integers(1, 40), st.data())
def test_every_token_has_exactly_its_window(size, data):
    dilation = data.draw(st.integers(1, size))
    window = data.draw(st.integers(1, max(1, size // dilation)))
    stride = data.draw(st.integers(1, window))
    near = neighbors(size, window, stride, dilation)
    assert (near.sum(-1) == window).all()
    place = torch.arange(size)
    assert not near[(place[:, None] - place) % dilation != 0].any()
    if stride == 1 and dilation == 1:
        half = window // 2
        inside = (place >= half) & (place < size - half)
        apart = (place[:, None] - place).abs()
        assert near.diagonal().all() and not near[inside][:, :][apart[inside] > half].any()


def test_windows_are_shared_by_strides():
    near = neighbors(24, 6, stride=3)
    assert all(near[i].equal(near[i // 3 * 3]) for i in range(24))
    blocked = neighbors(24, 6, stride=6)
    assert blocked.equal((torch.arange(24)[:, None] // 6) == torch.arange(24) // 6)


@given(grids(), st.sampled_from([8, 16]), st.sampled_from([0.3, 0.6, 1.0]), st.booleans())
def test_a_block_pair_is_kept_where_a_pair_of_its_tokens_may_be(grid, block, window, whole_tiles):
    """Never less than the token's own rule, axis by axis."""
    what = (sliding_tile if whole_tiles else Neighborhood)(window=window)
    places = grid.coordinates(what.order(grid, block))
    sides = what._tile(grid, block)
    kept = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    for axis, size in enumerate((grid.frames, grid.height, grid.width)):
        stride = sides[axis] if whole_tiles else 1
        near = neighbors(size, -int(-window * size // 1), stride)
        kept &= near[places[axis][:, None], places[axis]]
    touched = block_sums(kept.float()[None], block)[0] > 0
    keep = what.keep(grid, block)
    assert (keep | ~touched).all()
    if window == 1.0:
        assert keep.all()


def test_sliding_tiles_that_divide_the_grid_give_whole_blocks():
    """Where tiles fill blocks and windows are odd numbers of tiles, no visited block holds anything else."""
    grid, what = Grid(8, 16, 16), sliding_tile(window=0.75, tile=(2, 4, 4))
    places = grid.coordinates(what.order(grid, 32))
    kept = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    for axis, size, tile in ((0, 8, 2), (1, 16, 4), (2, 16, 4)):
        kept &= neighbors(size, int(0.75 * size), tile)[places[axis][:, None], places[axis]]
    sums = block_sums(kept.float()[None], 32)[0]
    assert ((sums == 0) | (sums == 32 * 32)).all() and what.keep(grid, 32).equal(sums > 0)
    assert what.window_density(grid, 32) == pytest.approx(plan_of(what, grid, 32).density) == 0.75**3


@given(grids(), st.floats(0.1, 1), st.integers(1, 2))
def test_what_windows_want_is_what_they_hold(grid, window, dilation):
    what = Neighborhood(window=window, dilation=(1, dilation, 1))
    frame, row, column, _ = grid.coordinates()
    inside = slice(grid.before, grid.before + grid.video)
    kept = torch.ones(grid.video, grid.video, dtype=torch.bool)
    axes = ((frame, grid.frames, 1), (row, grid.height, dilation), (column, grid.width, 1))
    for place, size, apart in axes:
        near = neighbors(size, math.ceil(window * size), 1, apart)
        kept &= near[place[inside][:, None], place[inside]]
    assert what.window_density(grid, 16) == pytest.approx(float(kept.double().mean()))
    assert plan_of(what, grid, 16).density >= what.window_density(grid, 16) * grid.video**2 / grid.tokens**2 - 1e-9


# --- settings


@pytest.mark.parametrize(
    "name, bad",
    [
        ("xattention", {"stride": 0}),
        ("subblock", {"subblocks": 0}),
        ("asa", {"samples": 0}),
        ("svg", {"samples": 0}),
        ("svg2", {"iterations": 0}),
        ("pbs", {"probe_queries": 0}),
        ("sparsed", {"groups": 0}),
        ("pbs", {"top_p": 0.0}),
        ("svg2", {"top_p": 1.5}),
        ("sparge", {"similarity_threshold": 1.5}),
        ("neighborhood", {"window": 0.0}),
        ("neighborhood", {"stride": (-1, 1, 1)}),
        ("neighborhood", {"dilation": (1, 0, 1)}),
    ],
    ids=str,
)
def test_values_out_of_range_are_named(name, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        method(name, **bad)


@pytest.mark.parametrize(
    "name, bad", [("xattention", {"stride": 5}), ("subblock", {"subblocks": 5}), ("adaspa", {"queries_per_block": 5})]
)
def test_what_must_divide_the_block_says_so(name, bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must divide the block of 16, got 5"):
        plan_of(method(name, **bad), GRID, 16)
