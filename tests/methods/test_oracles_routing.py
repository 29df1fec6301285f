"""Routing Transformer: its clusters against loops in float64, and the laws of balanced assignment."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attention_cases import qkv
from dit_sparse import Grid, Site
from dit_sparse.kernels.planning.equal_clusters import assign_equally
from dit_sparse.methods.layouts.routing import Routing, cluster_size

GRIDS = [Grid(5, 7, 3, after=11), Grid(5, 7, 3, before=19), Grid(1, 17, 13), Grid(40, 2, 2)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: str(grid).replace(" ", ""))


def unit(vectors: list[Tensor]) -> list[Tensor]:
    return [vector / vector.norm() for vector in vectors]


def spherical_kmeans(directions: list[Tensor], clusters: int, iterations: int) -> list[Tensor]:
    """Centroids of k-means by cosine similarity, starting from evenly spaced tokens."""
    centroids = [directions[c * len(directions) // clusters] for c in range(clusters)]
    for _ in range(iterations):
        members = [[] for _ in centroids]
        for x in directions:
            members[max(range(clusters), key=lambda c: float(x @ centroids[c]))].append(x)
        centroids = unit([sum(own) if own else old for own, old in zip(members, centroids, strict=True)])
    return centroids


def balance(directions: list[Tensor], centroids: list[Tensor], size: int, rounds: int) -> list[int]:
    """Clusters by rounds of offers, one token after the other; in round r, the first N / 2^r tokens without one."""
    clusters = len(centroids)
    free = [min(size, len(directions) - c * size) for c in range(clusters)]
    likeness = [[float(x @ c) for c in centroids] for x in directions]
    label: dict[int, int] = {}
    for turn in range(rounds):
        waiting = [t for t in range(len(directions)) if t not in label][: math.ceil(len(directions) / 2**turn)]
        is_open = [c for c in range(clusters) if free[c]]
        wish = {t: max(is_open, key=lambda c, t=t: likeness[t][c]) for t in waiting}
        for c in is_open:
            asking = sorted((t for t in waiting if wish[t] == c), key=lambda t, c=c: -likeness[t][c])[: free[c]]
            label |= dict.fromkeys(asking, c)
            free[c] -= len(asking)
    places = [c for c in range(clusters) for _ in range(free[c])]
    label |= dict(zip([t for t in range(len(directions)) if t not in label], places, strict=True))
    return [label[t] for t in range(len(directions))]


def members(order: Tensor, edges: Tensor) -> list[set[int]]:
    return [set(order[first:last].tolist()) for first, last in pairwise(edges.tolist())]


@every_grid
@pytest.mark.parametrize("rounds", [1, 2, 6])
def test_routing(grid, rounds):
    """Common centroids, balanced clusters, the own key cluster, and then the greatest products of means."""
    q, k, _ = qkv(grid.tokens, heads=2, dim=16, seed=4)
    plan = Routing(rounds=rounds, density=0.45).plan(q, k, None, Site(grid), {})
    video, size = slice(grid.before, grid.before + grid.video), cluster_size(grid.video)
    clusters, text = -(-grid.video // size), grid.tokens > grid.video
    for head in range(2):
        x, y = q[0, head, video].double(), k[0, head, video].double()
        directions = [unit(list(side - side.mean(0))) for side in (x, y)]
        centroids = spherical_kmeans((directions[0] + directions[1])[::4], clusters, 2)
        labels = [balance(side, centroids, size, rounds) for side in directions]
        for own, side in zip(labels, (plan.queries, plan.keys), strict=True):
            expected = [{grid.before + t for t, c in enumerate(own) if c == number} for number in range(clusters)]
            assert members(side.order[0, head], side.edges[0, head])[:clusters] == expected
        means = [
            torch.stack([side[torch.tensor(own) == c].mean(0) for c in range(clusters)])
            for side, own in zip((x, y), labels, strict=True)
        ]
        scores = means[0] @ means[1].T
        mask = plan.block_mask()[0, head]
        assert mask.diagonal().all() and (not text or (mask[-1].all() and mask[:, -1].all()))
        for row in range(clusters):
            kept = mask[row, :clusters].clone()
            kept[row] = False
            dropped = ~mask[row, :clusters]
            if kept.any() and dropped.any():
                assert scores[row][kept].min() >= scores[row][dropped].max() - 1e-6


@every_grid
def test_routing_without_a_density_is_the_own_cluster(grid):
    """The plan of the paper: all clusters have about sqrt(N) tokens and the same cost."""
    q, k, _ = qkv(grid.tokens, batch=2, dim=16)
    plan, size = Routing().plan(q, k, None, Site(grid), {}), cluster_size(grid.video)
    clusters = -(-grid.video // size)
    assert plan.block_mask()[..., :clusters, :clusters].equal(
        torch.eye(clusters, dtype=torch.bool).expand(2, 2, -1, -1)
    )
    for side in (plan.queries, plan.keys):
        assert (side.sizes[..., : clusters - 1] == size).all() and (side.sizes[..., clusters - 1] <= size).all()
    assert abs(size - grid.video**0.5) < 2


def test_routing_starts_from_the_centroids_of_the_previous_plan():
    grid = Grid(4, 8, 8)
    q, k, _ = qkv(grid.tokens, dim=16)
    memory, one = {}, Routing(density=0.3, init_iterations=1, iterations=1)
    one.plan(q, k, None, Site(grid), memory)
    second = one.plan(q, k, None, Site(grid, step=1), memory)
    assert second.queries.order.equal(
        Routing(density=0.3, init_iterations=2).plan(q, k, None, Site(grid), {}).queries.order
    )
    assert memory["centroids"].norm(dim=-1).sub(1).abs().max() < 1e-5


@given(st.integers(0, 10_000), st.integers(2, 60), st.integers(1, 9), st.integers(0, 8))
def test_clusters_have_equal_sizes(seed, tokens, size, rounds):
    """Also if all tokens ask for one centroid."""
    generator, clusters = torch.Generator().manual_seed(seed), -(-tokens // size)
    x, centroids = (F.normalize(torch.randn(2, 1, n, 4, generator=generator), dim=-1) for n in (tokens, clusters))
    if seed % 2:
        x = x[:, :, :1].expand_as(x)
    labels = assign_equally(x, centroids, size, rounds)
    sizes = torch.stack([(labels == c).sum(-1) for c in range(clusters)], -1)
    assert (sizes[..., :-1] == size).all() and (sizes[..., -1] == tokens - (clusters - 1) * size).all()


def test_tokens_are_refused_for_more_similar_ones_alone():
    """In the first round: the tokens of a cluster that had asked for it are more similar than those it refused."""
    generator = torch.Generator().manual_seed(1)
    x, centroids = (F.normalize(torch.randn(1, 1, n, 6, generator=generator), dim=-1) for n in (30, 6))
    labels, likeness = assign_equally(x, centroids, 5)[0, 0], (x @ centroids.mT)[0, 0]
    first = likeness.argmax(-1)
    assert (labels == first).sum() == first.bincount(minlength=6).clamp(max=5).sum()
    for token in (labels != first).nonzero():
        rivals = likeness[(labels == first[token]) & (first == first[token]), first[token]]
        assert (rivals >= likeness[token, first[token]]).all()


def test_tokens_that_do_not_fit_are_named():
    x = F.normalize(torch.randn(1, 1, 30, 6), dim=-1)
    for clusters in (3, 8):
        with pytest.raises(ValueError, match=f"30 tokens do not fill {clusters} clusters of 5"):
            assign_equally(x, x[:, :, :clusters], 5)
