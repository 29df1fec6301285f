"""Methods that search blocks or clusters against short re-implementations of the rules of their papers, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import BLOCK, GRIDS, attention_map, blocks_of, top_k, top_p, video_of
from torch import Tensor

from attention_cases import plan_of, qkv
from dit_sparse import Grid, Site
from dit_sparse.methods.layouts.pbs import PBS
from dit_sparse.methods.layouts.svg2 import SVG2
from dit_sparse.methods.schedules.adaspa import AdaSpa
from dit_sparse.methods.schedules.sparsed import SparseD

every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: str(grid).replace(" ", ""))


def inputs(grid: Grid, heads: int = 2) -> tuple[Tensor, Tensor]:
    q, k, _ = qkv(grid.tokens, heads=heads, dim=16, seed=6)
    return 1.5 * q, k


# --- exact block mass


def block_mass(grid: Grid, weights: Tensor, every: int) -> dict[int, dict[int, float]]:
    """Return the attention from every ``every``-th query of each video block to each other one."""
    blocks = blocks_of(grid)
    video = video_of(grid, blocks)
    return {i: {j: float(weights[blocks[i][::every]][:, blocks[j]].sum()) for j in video} for i in video}


@every_grid
@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize(("method", "density"), [(SparseD, 0.3), (AdaSpa, 0.2)])
def test_rows_keep_their_heaviest_blocks(grid, rows, method, density):
    """SparseD and AdaSpa without levels: the own block, and the blocks with the most exact mass, equally many."""
    q, k = inputs(grid)
    settings = {} if method is SparseD else {"head_adaptive": False}
    mask = plan_of(method(queries_per_block=rows, **settings), grid, BLOCK, q, k).block_mask()[0]
    for head in range(2):
        counts = set()
        for i, mass in block_mass(grid, attention_map(q[0, head], k[0, head]), BLOCK // (rows or BLOCK)).items():
            kept = {j for j in mass if mask[head, i, j]}
            assert kept == top_k(mass, len(kept), own=i)
            counts.add(len(kept))
        assert max(counts) - min(counts) <= 1
    plan = plan_of(method(queries_per_block=rows, **settings), grid, BLOCK, q, k)
    assert plan.density == pytest.approx(max(density, method().least_density(grid, BLOCK)), abs=0.01)


@every_grid
def test_adaspa_levels(grid):
    """Of the pairs without text, heads that hold over .8 of their mass get half, equally many of the others 3/2."""
    q, k = inputs(grid, heads=6)
    k = k * torch.tensor([0.1, 0.5, 1, 2, 4, 6])[:, None, None]
    base, levels = (plan_of(AdaSpa(density=0.45, head_adaptive=on), grid, BLOCK, q, k) for on in (False, True))
    blocks = blocks_of(grid)
    video = video_of(grid, blocks)
    recall = []
    for head in range(6):
        weights = attention_map(q[0, head], k[0, head])
        mass = torch.tensor([[float(weights[a][:, b].sum()) / len(a) for b in blocks] for a in blocks])
        recall.append(float((mass * base.block_mask()[0, head]).sum() / mass.sum()))
    number = min(sum(one > 0.8 for one in recall), 3)
    assert number, "the case is too easy"
    by_recall = sorted(range(6), key=lambda head: -recall[head])
    pairs = lambda plan, head: sum(
        len(blocks[i]) * len(blocks[j]) for i in video for j in video if plan.block_mask()[0, head, i, j]
    )
    for rank, head in enumerate(by_recall):
        level = 0.5 if rank < number else 1.5 if rank >= 6 - number else 1.0
        assert pairs(levels, head) == pytest.approx(level * pairs(base, head), abs=2.5 * BLOCK**2)
    assert levels.density == pytest.approx(0.45, abs=0.01)


# --- svg2


def lloyd(x: Tensor, clusters: int, iterations: int) -> tuple[list[int], Tensor]:
    """Return the labels of k-means from evenly spaced tokens, and the mean of each cluster."""
    centroids = torch.stack([x[c * len(x) // clusters] for c in range(clusters)])
    for _ in range(iterations):
        labels = [int((token - centroids).square().sum(1).argmin()) for token in x]
        means = []
        for c in range(clusters):
            members = [token for token, label in zip(x, labels, strict=True) if label == c]
            means.append(torch.stack(members).mean(0) if members else centroids[c])
        centroids = torch.stack(means)
    return labels, centroids


@every_grid
def test_svg2(grid):
    """Clusters of queries and keys; top-p of .9 of the attention between centroids weighted by the size of the key
    cluster, at least a tenth of the key clusters; text attends to all and is attended by all."""
    q, k = inputs(grid)
    video = slice(grid.before, grid.before + grid.video)
    mask = plan_of(SVG2(), grid, BLOCK, q, k).token_mask(torch.arange(grid.tokens))[0]
    queries, keys = (round(n * math.sqrt(grid.video / 75_600)) for n in (300, 1000))
    for head in range(2):
        query_labels, query_means = lloyd(q[0, head, video].double(), queries, 2)
        key_labels, key_means = lloyd(k[0, head, video].double(), keys, 2)
        size = {c: key_labels.count(c) for c in range(keys) if key_labels.count(c)}
        kept = {}
        for c in set(query_labels):
            mass = {d: n * math.exp(float(query_means[c] @ key_means[d]) / 4) for d, n in size.items()}
            kept[c] = top_p(mass, 0.9, least=int(0.1 * keys))
        expected = torch.ones_like(mask[head])
        expected[video, video] = torch.tensor([[d in kept[c] for d in key_labels] for c in query_labels])
        assert mask[head].equal(expected) and not mask[head].all()


# --- pbs


@every_grid
def test_pbs(grid):
    """Keys sorted by importance within segments of two blocks; the own segment, and of the other blocks top-p of .9 of
    the attention between the means of four parts of a block."""
    q, k = inputs(grid)
    mask = plan_of(PBS(), grid, BLOCK, q, k).token_mask(torch.arange(grid.tokens))[0]
    for head in range(2):
        weights = (q[0, head].double() @ k[0, head].double().mT / 4)[grid.before : grid.before + grid.video]
        weights = weights[:, grid.before : grid.before + grid.video].softmax(-1)
        importance = weights[:: max(1, grid.video // 64)].mean(0).tolist()
        segment = lambda token: token // (2 * BLOCK)
        keys = sorted(range(grid.video), key=lambda token: (segment(token), -importance[token]))
        cut = lambda tokens: [tokens[first : first + BLOCK] for first in range(0, grid.video, BLOCK)]
        query_blocks, key_blocks = cut(list(range(grid.video))), cut(keys)
        expected = torch.ones_like(mask[head])
        parts = lambda tokens: [part for first in (0, 4, 8, 12) if (part := tokens[first : first + BLOCK // 4])]
        key_parts = [(j, part) for j, tokens in enumerate(key_blocks) for part in parts(tokens)]
        offset = lambda tokens: [token + grid.before for token in tokens]
        means = torch.stack([k[0, head, offset(part)].double().mean(0) for _, part in key_parts])
        for i, queries in enumerate(query_blocks):
            mass = {j: 0.0 for j in range(len(key_blocks)) if j // 2 != i // 2}
            for part in parts(queries):
                logits = q[0, head, offset(part)].double().mean(0) @ means.mT / 4
                sizes = torch.tensor([len(members) for _, members in key_parts], dtype=torch.float64)
                for (j, _), share in zip(key_parts, (logits + sizes.log()).softmax(0).tolist(), strict=True):
                    mass[j] = mass.get(j, 0.0) + len(part) * share
            mass = {j: value for j, value in mass.items() if j // 2 != i // 2}
            kept = top_p(mass, 0.9) | {j for j in range(len(key_blocks)) if j // 2 == i // 2}
            for j, tokens in enumerate(key_blocks):
                rows = torch.tensor(queries)[:, None] + grid.before
                expected[rows, torch.tensor(tokens) + grid.before] = j in kept
        assert mask[head].equal(expected) and not mask[head].all()


@every_grid
def test_searches_are_repeated_by_the_rule_of_the_paper(grid):
    """AdaSpa searches again after .4 of the steps, SparseD never."""
    q, k = inputs(grid)
    for method, again in ((AdaSpa(), [0, 20, 40]), (SparseD(), [0])):
        memory, made, last = {}, [], None
        for step in range(50):
            plan = method.plan(q, k, k, Site(grid, BLOCK, step=step, steps=50), memory)
            made += [step] if plan is not last else []
            last = plan
        assert made == again
