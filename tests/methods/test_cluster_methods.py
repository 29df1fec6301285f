"""Methods that sort tokens into clusters, against their rules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attention_cases import assert_near, block_sums, qkv, softmax_map
from dit_sparse import Grid, Site, attention
from dit_sparse.kernels.planning.block_mass import log_sum_exp
from dit_sparse.kernels.planning.cluster import kmeans
from dit_sparse.methods.layouts.pbs import PBS
from dit_sparse.methods.layouts.svg2 import SVG2

LINE = Grid(4, 29, 1)  # 116 tokens
every_text = pytest.mark.parametrize(
    "grid", [Grid(4, 16, 24), Grid(4, 16, 24, after=33), Grid(4, 16, 24, before=33)], ids=str
)


# --- svg2


def test_svg2_with_a_cluster_for_each_token_is_dense():
    grid = Grid(5, 7, 3, after=11)
    q, k, v = qkv(grid.tokens, batch=2, dim=16)
    method = SVG2(query_clusters=10**6, key_clusters=10**6, top_p=1.0)
    out, lse = attention(q, k, v, grid=grid, method=method, executor="gather")
    assert_near(out, F.scaled_dot_product_attention(q, k, v), 1e-3)
    assert_near(lse, log_sum_exp(q, k), 1e-3)


@every_text
@pytest.mark.parametrize("density", [0.15, 0.25, 0.5])
def test_svg2_meets_the_density_to_a_cluster(grid, density):
    q, k, _ = qkv(grid.tokens, batch=2, dim=16)
    plan = SVG2(init_iterations=5, density=density).plan(q, k, k, Site(grid), {})
    assert plan.density == pytest.approx(density, abs=0.01)


def test_svg2_keeps_the_fewest_clusters_that_reach_top_p():
    q, k, _ = qkv(LINE.tokens, dim=16)
    memory, method = {}, SVG2(query_clusters=150, key_clusters=281, top_p=0.7, min_ratio=0.0, init_iterations=5)
    plan = method.plan(q, k, k, Site(LINE), memory)
    centroids = [memory[f"{side} centroids"].double() for side in ("query", "key")]
    mass = (centroids[0] @ centroids[1].mT / 4).exp() * plan.keys.sizes[..., None, :]
    mass = mass / mass.sum(-1, keepdim=True)
    keep = plan.block_mask()
    total = (mass * keep).sum(-1)
    lightest = mass.masked_fill(~keep, torch.inf).amin(-1)
    assert (total >= 0.7 - 1e-6).all() and (total - lightest < 0.7).all()
    assert (lightest >= mass.masked_fill(keep, 0).amax(-1)).all(), "the heaviest clusters are kept"


def test_svg2_starts_from_the_previous_centroids():
    q, k, _ = qkv(LINE.tokens, batch=2, dim=16)
    method = SVG2(query_clusters=150, key_clusters=281, init_iterations=3, iterations=1, density=0.3)
    memory = {}
    first = method.plan(q, k, k, Site(LINE), memory)
    before = {name: x.clone() for name, x in memory.items()}
    second = method.plan(q, k, k, Site(LINE, step=1), memory)
    clusters, centroids = kmeans(k, 11, 1, before["key centroids"])
    assert memory["key centroids"].equal(centroids) and second.keys.order.equal(clusters.order)
    items = [method.plan(q[b : b + 1], k[b : b + 1], k[b : b + 1], Site(LINE), {}) for b in range(2)]
    assert all(item.block_mask().equal(first.block_mask()[b : b + 1]) for b, item in enumerate(items))


# --- pbs


@every_text
@pytest.mark.parametrize("density", [0.15, 0.25, 0.5])
def test_pbs_meets_the_density_to_a_block(grid, density):
    q, k, _ = qkv(grid.tokens, batch=2, dim=16)
    plan = PBS(density=density).plan(q, k, k, Site(grid, 32), {})
    assert plan.density == pytest.approx(density, abs=0.01)


def test_pbs_puts_important_keys_into_one_block():
    """Sixteen keys, spread over the video, receive nearly all attention."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 320, 16, generator=generator)
    important = torch.randperm(320, generator=generator)[:16]
    q[..., 0], k[..., 0] = 8.0, 0.0
    k[:, :, important, 0] = 8.0
    plan = PBS(top_p=0.9, segment_blocks=20).plan(q, k, k, Site(Grid(5, 8, 8), 16), {})
    assert plan.keys.order[..., :16].sort(-1).values.equal(important.sort().values.expand(1, 2, -1))
    assert plan.queries.order.flatten().equal(torch.arange(320))


def test_pbs_sorts_within_segments_and_ranks_by_exact_attention():
    """A mean of one token is the token."""
    grid = Grid(4, 8, 10)  # 20 blocks of 16, in five segments of four
    q, k, _ = qkv(grid.tokens, batch=2, dim=16)
    method = PBS(density=0.3, segment_blocks=4, probe_queries=320, subblocks=16)
    plan = method.plan(q, k, k, Site(grid, 16), {})
    segment = torch.arange(320) // 64
    assert (plan.keys.order // 64).equal(segment.expand(2, 2, -1))
    importance = softmax_map(q, k).mean(2)
    ranked = torch.take_along_dim(importance, plan.keys.order, -1).unflatten(-1, (5, 4, 16))
    assert (ranked[:, :, :, :-1].amin(-1) >= ranked[:, :, :, 1:].amax(-1) - 1e-6).all()
    mass = torch.take_along_dim(softmax_map(q, k), plan.keys.order[:, :, None], -1)
    own = torch.arange(20)[:, None] // 4 == torch.arange(20) // 4
    best = block_sums(mass, 16).masked_fill(own, torch.inf).topk(6, dim=-1).indices
    assert plan.block_mask().equal(torch.zeros(2, 2, 20, 20, dtype=torch.bool).scatter(-1, best, True))


def test_top_p_of_pbs_leaves_out_the_own_segment():
    """As in the authors' code. Queries that attend to their own segment and to one other keep these two."""
    segments = F.one_hot(torch.arange(320) // 32, 10).float()
    noise = 0.1 * torch.randn(2, 1, 2, 320, 22, generator=torch.Generator().manual_seed(0))
    q, k = (torch.cat([segments.expand(1, 2, -1, -1), part], -1) for part in noise)
    q[..., :10] = 40 * (segments + 0.7 * segments.roll(1, -1))
    plan = PBS(top_p=0.9).plan(q, k, k, Site(Grid(5, 8, 8), 16), {})
    segment = torch.arange(20) // 2
    distance = (segment - segment[:, None]) % 10
    assert plan.block_mask().equal((distance <= 1).expand(1, 2, -1, -1)) and plan.density == pytest.approx(0.2)


def test_pbs_sorts_long_sequences_exactly():
    """An importance is about 1 / length, too small to add to the number of a segment in float32."""
    grid = Grid(30, 32, 32)
    q, k, _ = qkv(grid.tokens, heads=1, dim=8)
    plan = PBS(density=0.05, probe_queries=16).plan(q, k, k, Site(grid, 128), {})
    importance = (q[:, :, :: grid.tokens // 16].double() @ k.double().mT * 8**-0.5).softmax(-1).mean(2)
    ranked = torch.take_along_dim(importance, plan.keys.order, -1).unflatten(-1, (-1, 2, 128))
    assert (ranked[..., 0, :].amin(-1) >= ranked[..., 1, :].amax(-1) * (1 - 1e-5)).all()
