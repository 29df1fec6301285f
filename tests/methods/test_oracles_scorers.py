"""Scorers against short re-implementations of the rules of their papers, one block pair at a time, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracles import BLOCK, GRIDS, attention_map, blocks_of, mask_of, top_k, top_p, video_of
from torch import Tensor

from attention_cases import plan_of, qkv
from dit_sparse import Grid, order
from dit_sparse.methods.corrections.sol import Sol
from dit_sparse.methods.patterns.vdit import Vertical
from dit_sparse.methods.scorers.asa import ASA
from dit_sparse.methods.scorers.sparge import Sparge
from dit_sparse.methods.scorers.subblock import SubBlock
from dit_sparse.methods.scorers.xattention import XAttention

every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: str(grid).replace(" ", ""))
Blocks = list[list[int]]
Choose = Callable[[Tensor, Tensor, Blocks, list[int]], dict[int, set[int]]]  # q, k, blocks, those without text


def check(method, grid: Grid, choose: Choose, sequence: Tensor | None = None) -> None:
    """Assert that every head keeps the blocks that the oracle chooses."""
    q, k, _ = qkv(grid.tokens, heads=2, dim=16, seed=4)
    mask, blocks = plan_of(method, grid, BLOCK, q, k).block_mask()[0], blocks_of(grid, sequence)
    for head in range(2):
        rows = choose(q[0, head].double(), k[0, head].double(), blocks, video_of(grid, blocks))
        assert mask[head].equal(mask_of(rows, blocks)), f"head {head} keeps other blocks"
    assert not mask.all(), "the case is too easy"


@every_grid
@pytest.mark.parametrize("stride", [4, 8])
def test_xattention(grid, stride):
    """Antidiagonal sums of S x S tiles, softmax over the tiles of a row, block sums, top-p of .9."""

    def choose(q, k, blocks, video):
        products, tokens = (q @ k.mT / (stride * math.sqrt(q.shape[1]))).tolist(), len(q)
        tiles = -(-tokens // stride)
        logits = torch.zeros(tiles, tiles, dtype=torch.float64)
        for i in range(tiles):
            for j in range(tiles):
                for t in range(stride):
                    row, column = i * stride + stride - 1 - t, j * stride + t
                    if row < tokens and column < tokens:
                        logits[i, j] += products[row][column]
        weights, per_block = logits.softmax(-1), BLOCK // stride
        share = lambda i, j: float(
            weights[i * per_block : (i + 1) * per_block, j * per_block : (j + 1) * per_block].sum()
        )
        return {i: top_p({j: share(i, j) for j in video}, 0.9, own=i) for i in video}

    check(XAttention(stride=stride), grid, choose)


@every_grid
@pytest.mark.parametrize("samples", [4, 16])
def test_asa(grid, samples):
    """Scores between a few tokens of each block along the generalized Hilbert curve; top-p of .95, from 5 to 17 %."""
    within = torch.randperm(BLOCK, generator=torch.Generator().manual_seed(0))[:samples].tolist()
    sequence = order.gilbert(grid)

    def choose(q, k, blocks, video):
        sampled = [[block[min(place, len(block) - 1)] for place in within] for block in blocks]
        scores = (q @ k.mT / math.sqrt(q.shape[1])).tolist()
        best = {}  # of sample r of block i: its largest score in every block
        for i in video:
            for r in sampled[i]:
                best[i, r] = [max(scores[r][int(c)] for c in part) for part in sampled]
        rows = {}
        for i in video:
            score = {j: max(math.exp(best[i, r][j] - max(best[i, r])) for r in sampled[i]) for j in video}
            count = len(video)
            rows[i] = top_p(score, 0.95, own=i, least=int(0.05 * count), most=max(1, round(0.17 * count)))
        return rows

    check(ASA(samples=samples), grid, choose, sequence)


@every_grid
@pytest.mark.parametrize("threshold", [0.0, 0.11])
@pytest.mark.parametrize("hilbert", [True, False])
def test_sparge(grid, threshold, hilbert):
    """Softmax of the products of block means, the mean of all keys subtracted; top 25 % of the blocks with similar
    tokens; dissimilar blocks on top, as rows and as columns."""
    sequence = order.hilbert(grid) if hilbert else None

    def similarity(x, block):
        directions = F.normalize(x[block], dim=-1)
        return float((directions @ directions.T).mean())

    def choose(q, k, blocks, video):
        k = k - k.mean(0)
        dissimilar = {j for j in video if similarity(k, blocks[j]) < threshold}
        rows = {}
        for i in video:
            if similarity(q, blocks[i]) < threshold:
                rows[i] = set(video)
                continue
            scores = {j: float(q[blocks[i]].mean(0) @ k[blocks[j]].mean(0)) for j in video if j not in dissimilar}
            rows[i] = dissimilar | top_k(scores, max(1, round(0.25 * len(video))), own=i)
        return rows

    check(Sparge(similarity_threshold=threshold, hilbert=hilbert), grid, choose, sequence)


@every_grid
@pytest.mark.parametrize("parts", [2, 4])
def test_subblock(grid, parts):
    """Mass between two blocks as the means of their sub-blocks predict it; top 25 %."""
    size = BLOCK // parts

    def choose(q, k, blocks, video):
        parts = [[block[first : first + size] for first in range(0, len(block), size)] for block in blocks]
        queries, keys = ([[x[part].mean(0) for part in own] for own in parts] for x in (q, k))

        def mass(i, j):
            return sum(
                len(a) * len(b) * math.exp(float(x @ y) / math.sqrt(q.shape[1]))
                for a, x in zip(parts[i], queries[i], strict=True)
                for b, y in zip(parts[j], keys[j], strict=True)
            )

        number = max(1, round(0.25 * len(video)))
        return {i: top_k({j: mass(i, j) for j in video}, number, own=i) for i in video}

    check(SubBlock(subblocks=parts), grid, choose)


@every_grid
def test_sol(grid):
    """Products of block means, keys centred, above 1.3 standard deviations; the diagonal and its neighbours."""

    def choose(q, k, blocks, video):
        queries, keys = ([x[block].mean(0) for block in blocks] for x in (q, k))
        centre = torch.stack(keys).mean(0)
        keys = [key - centre for key in keys]
        variance = torch.stack(keys).square().mean(0)
        rows = {}
        for i in video:
            deviation = math.sqrt(float((queries[i].square() * variance).sum()))
            rows[i] = {j for j in video if abs(i - j) <= 1 or float(queries[i] @ keys[j]) > 1.3 * deviation}
        return rows

    check(Sol(), grid, choose)


@every_grid
def test_vertical(grid):
    """The key blocks that receive most attention of random queries, the same for all rows; top 25 %."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(grid.before, grid.before + grid.video, (64,), generator=generator)

    def choose(q, k, blocks, video):
        weights = attention_map(q, k)[samples].sum(0)
        received = {j: float(weights[blocks[j]].sum()) for j in video}
        number = max(1, round(0.25 * len(video)))
        return {i: top_k(received, number, own=i) for i in video}

    check(Vertical(), grid, choose)
