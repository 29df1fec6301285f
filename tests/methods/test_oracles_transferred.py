"""Methods transferred from language models against short re-implementations of their rules, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import BLOCK, attention_map, blocks_of, mask_of, ranked, top_k, video_of
from torch import Tensor

from attention_cases import plan_of, qkv
from dit_sparse import Grid, Site, Top
from dit_sparse.density import share_pairs
from dit_sparse.methods.schedules.deltallm import DeltaLLM
from dit_sparse.methods.schedules.nosa import NOSA
from dit_sparse.methods.schedules.token_select import TokenSelect
from dit_sparse.methods.scorers.dhsa import DHSA
from dit_sparse.methods.scorers.double_sparsity import DoubleSparsity, heavy_channels
from dit_sparse.methods.scorers.gui_kv import GUIKV, orthonormal_basis
from dit_sparse.methods.scorers.proxyattn import ProxyAttn, group_heads

GRIDS = [Grid(5, 7, 6, after=27), Grid(1, 13, 17), Grid(40, 2, 2)]  # text; one frame and a ragged block; small frames
DIM = 16
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: str(grid).replace(" ", ""))


def spread(count: int, total: int, first: int = 0) -> list[int]:
    """Return evenly spaced numbers, at most all of them."""
    count = min(count, total)
    return [first + number * total // count for number in range(count)]


def check_rows(mask: Tensor, blocks: list[list[int]], rows: dict[int, set[int]]) -> None:
    """Assert that one head keeps these blocks, and text."""
    assert mask.equal(mask_of(rows, blocks)) and not mask.all()


# --- double sparsity


def approximate_map(q: Tensor, k: Tensor, channels: list[int]) -> Tensor:
    return (q[:, channels] @ k[:, channels].T / math.sqrt(len(channels))).softmax(-1)


@every_grid
@pytest.mark.parametrize("adjacent", [True, False])
def test_double_sparsity(grid, adjacent):
    """The 3 heaviest pairs of channels of each head; attention of 4 queries of a block by them; top 25 %."""
    q, k, _ = qkv(grid.tokens, dim=DIM, seed=4)
    q, k = (x * torch.linspace(0.2, 2, DIM).roll(3) for x in (q, k))
    method = DoubleSparsity(share=0.375, adjacent_pairs=adjacent, samples=50, budget=Top(0.25))
    mask, blocks = plan_of(method, grid, BLOCK, q, k).block_mask()[0], blocks_of(grid)
    video, samples = video_of(grid, blocks), spread(50, grid.video, grid.before)
    pairs = [(2 * c, 2 * c + 1) if adjacent else (c, c + DIM // 2) for c in range(DIM // 2)]
    for head in range(2):
        queries, keys = q[0, head].double(), k[0, head].double()
        centred = keys - keys[samples].mean(0)
        products = [float((queries[samples, c][:, None] * centred[samples, c]).abs().mean()) for c in range(DIM)]
        best = sorted(pairs, key=lambda pair: -sum(products[c] for c in pair))[:3]
        weights = approximate_map(queries, keys, [c for pair in best for c in pair])
        mass = lambda i, j: float(weights[blocks[i][:: BLOCK // 4]][:, blocks[j]].sum())  # noqa: B023
        number = max(1, round(0.25 * len(video)))
        check_rows(mask[head], blocks, {i: top_k({j: mass(i, j) for j in video}, number, own=i) for i in video})


def test_double_sparsity_keeps_the_channels_of_the_first_plan():
    grid, memory = GRIDS[0], {}
    (q, k, _), (late_q, late_k, _) = (qkv(grid.tokens, dim=DIM, seed=seed) for seed in (1, 2))
    method, site = DoubleSparsity(share=0.25, density=0.5), Site(grid, BLOCK)
    method.plan(q, k, None, site, memory)
    plan = method.plan(late_q, late_k, None, site, memory)
    found = tuple(tuple(head) for head in memory["channels"][0].tolist())
    stored = DoubleSparsity(channels=(found,), density=0.5)
    assert plan.block_mask().equal(stored.plan(late_q, late_k, None, site, {}).block_mask())
    assert not plan.block_mask().equal(method.plan(late_q, late_k, None, site, {}).block_mask())
    with pytest.raises(ValueError, match="channels must be those of 3 layers with 2 heads"):
        stored.check_model(3, 2)
    with pytest.raises(ValueError, match="channels do not fit 2 heads with a head_dim of 4"):
        stored.plan(late_q[..., :4], late_k[..., :4], None, site, {})


def test_channels_of_an_odd_head_dim_are_no_pairs():
    q = torch.tensor([1.0, 5.0, 3.0]).expand(1, 1, 4, 3) * torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    assert heavy_channels(q, q, 2)[0, 0].tolist() == [1, 2]


# --- proxyattn


def alike_heads(grid: Grid) -> tuple[Tensor, Tensor]:
    """Heads 0 and 2, and heads 1 and 3, attend alike; the latter attend to few keys."""
    q, k, _ = qkv(grid.tokens, heads=2, dim=DIM, seed=6)
    noise = torch.randn(2, 1, 4, grid.tokens, DIM, generator=torch.Generator().manual_seed(1)) / 10
    q = torch.cat([q, q], 1) * torch.tensor([1.0, 3.0, 1.0, 3.0])[:, None, None]
    return q + noise[0], torch.cat([k, k], 1) + noise[1]


@every_grid
@pytest.mark.parametrize("density", [None, 0.6])
def test_proxyattn(grid, density):
    """Best score of every fourth token of the mean head of a group; the budget of a head holds .7 of the attention of
    20 probe queries, scaled to the density."""
    q, k = alike_heads(grid)
    method = ProxyAttn(density=density, stride=4, mass=0.7, probes=20)
    mask, blocks = plan_of(method, grid, BLOCK, q, k).block_mask()[0], blocks_of(grid)
    video = video_of(grid, blocks)
    budget = []
    for head in range(4):
        weights = attention_map(q[0, head], k[0, head])[spread(20, grid.video, grid.before)]
        counts = []
        for probe in weights:
            held = sorted((float(probe[blocks[j]].sum()) for j in video), reverse=True)
            counts.append(next(n for n in range(1, len(held) + 1) if sum(held[:n]) >= 0.7 * sum(held) - 1e-12))
        budget.append(sum(counts) / len(counts))
    pairs = lambda head: sum(len(blocks[i]) * len(blocks[j]) for i in video for j in video if mask[head, i, j])
    if density is None:
        assert all(mask[h][video][:, video].sum() == round(budget[h]) * len(video) for h in range(4))
    else:
        size = sum(len(blocks[j]) for j in video)
        total = density * grid.tokens**2 - (grid.tokens**2 - size**2)
        for head, expected in enumerate(scaled(budget, total, blocks, video)):
            assert pairs(head) == pytest.approx(expected, abs=1.5 * BLOCK**2)
    for group in ([0, 2], [1, 3]):
        queries, keys = (x[0, group].double().mean(0)[::4] for x in (q, k))
        weights = attention_map(queries, keys)
        strided = lambda block: [token // 4 for token in block if token % 4 == 0]
        best = lambda i, j: float(weights[strided(blocks[i])][:, strided(blocks[j])].max())  # noqa: B023
        for head in group:
            for i in video:
                kept = {j for j in video if mask[head, i, j]}
                assert kept == top_k({j: best(i, j) for j in video}, len(kept), own=i)


def scaled(budget: list[float], pairs: float, blocks: list[list[int]], video: list[int]) -> list[float]:
    """Return the pairs of each head: its budget times the factor at which their mean is ``pairs``, found by bisection,
    at least those of the diagonal and at most all."""
    least, most = sum(len(blocks[i]) ** 2 for i in video), sum(len(blocks[i]) for i in video) ** 2
    low, high = 0.0, float(most)
    for _ in range(100):
        middle = (low + high) / 2
        by_head = [min(max(middle * one, least), most) for one in budget]
        low, high = (middle, high) if sum(by_head) / len(by_head) < pairs else (low, middle)
    return by_head


@pytest.mark.parametrize("pairs", [1.0, 10.0, 50.0, 70.0, 99.0, 200.0])
def test_share_pairs(pairs):
    """Shares are proportional to the weights where no bound is met, and have the mean that is asked for."""
    weights = torch.tensor([[1.0, 2.0, 3.0, 30.0], [5.0, 5.0, 5.0, 5.0]])
    shares = share_pairs(pairs, weights, 10.0, 100.0)
    assert shares.mean(-1).tolist() == pytest.approx([min(max(pairs, 10), 100)] * 2)
    assert shares.min() >= 10 - 1e-9 and shares.max() <= 100 + 1e-9
    for share, weight in zip(shares, weights, strict=True):
        scale = [float(s / w) for s, w in zip(share, weight, strict=True) if 10 + 1e-6 < s < 100 - 1e-6]
        assert not scale or max(scale) == pytest.approx(min(scale))


def test_heads_with_similar_features_form_a_group():
    features = torch.tensor([[[1, 0.1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0.1]], [[1.0, 1, 1]] * 5])
    groups = group_heads(features, 3)
    assert groups.sum(-1).eq(1).all() and groups[1, :, 0].eq(1).all()
    first = groups[0].argmax(-1).tolist()
    assert first[0] == first[2] and first[1] == first[4] and len(set(first)) == 3


# --- dhsa


def chunk_starts(q: Tensor, k: Tensor, blocks: list[list[int]]) -> set[int]:
    """Return the tokens at which chunks start: q and k of all heads, ``[H, N, D]``."""
    tokens, ratio = q.shape[1], {}
    for n in range(4, tokens - 4):
        left = 0.0
        for queries, keys in zip(q, k, strict=True):
            neighbours = [n - 4, n - 3, n - 2, n - 1, n + 1, n + 2, n + 3, n + 4]
            left += float((keys[neighbours] @ queries[n] / math.sqrt(DIM)).softmax(-1)[:4].sum()) / len(q)
        ratio[n] = max(left, 1 - left) / min(left, 1 - left)
    inside = {n for n in ratio if ratio[n] >= 1.1}
    inside = {n for n in inside if all(ratio[n] >= ratio.get(m, 1) for m in range(n - 8, n + 9))}
    return inside | {block[0] for block in blocks}


@every_grid
def test_dhsa(grid):
    """Chunks that start where attention to the neighbours is one-sided; means times the root of the length; a block has
    its best score; top 25 %."""
    q, k, _ = qkv(grid.tokens, dim=DIM, seed=8)
    mask, blocks = plan_of(DHSA(), grid, BLOCK, q, k).block_mask()[0], blocks_of(grid)
    q, k = q[0].double(), k[0].double()
    k = k - k.mean(1, keepdim=True)
    starts, video = sorted(chunk_starts(q, k, blocks)), video_of(grid, blocks)
    chunks = [range(a, b) for a, b in zip(starts, [*starts[1:], grid.tokens], strict=True)]
    assert len(chunks) > len(blocks), "the case is too easy"
    of_block = lambda i: [chunk for chunk in chunks if chunk.start // BLOCK == i]
    for head in range(2):
        vector = lambda x, chunk, head=head: x[head, chunk.start : chunk.stop].mean(0) * math.sqrt(len(chunk))
        queries, keys = ([[vector(x, chunk) for chunk in of_block(i)] for i in range(len(blocks))] for x in (q, k))
        score = lambda i, j: max(float(a @ b) for a in queries[i] for b in keys[j])  # noqa: B023
        number = max(1, round(0.25 * len(video)))
        check_rows(mask[head], blocks, {i: top_k({j: score(i, j) for j in video}, number, own=i) for i in video})


# --- gui-kv


@every_grid
def test_gui_kv(grid):
    """Attention from 6 queries of the frame of a row and the norm of values, reduced where the span of 3 keys of the
    frame holds a key of another one; means over blocks; top 25 %."""
    q, k, v = qkv(grid.tokens, dim=DIM, seed=9)
    v = v * torch.linspace(0.1, 2, grid.tokens)[:, None]
    method = GUIKV(samples=6, rank=3, norm_weight=0.7, redundancy=0.8)
    mask, blocks = method.plan(q, k, v, Site(grid, BLOCK), {}).block_mask()[0], blocks_of(grid)
    video = video_of(grid, blocks)
    frame_of = [min(max(n - grid.before, 0), grid.video - 1) // grid.frame for n in range(grid.tokens)]
    for head in range(2):
        weights, keys = attention_map(q[0, head], k[0, head]), k[0, head].double()
        keys = keys - keys.mean(0)
        norm = v[0, head].double().norm(dim=-1)
        norm = norm / norm.mean()
        scores = {}  # of a frame: those of all tokens
        for frame in range(grid.frames):
            first = grid.before + frame * grid.frame
            received = weights[spread(6, grid.frame, first)].mean(0) * grid.tokens
            basis = torch.linalg.qr(keys[spread(3, grid.frame, first)].T)[0]
            inside = (keys @ basis).square().sum(-1) / keys.square().sum(-1)
            inside[[n for n in range(grid.tokens) if frame_of[n] == frame]] = 0
            scores[frame] = (received + 0.7 * norm) * (1 - 0.8 * inside)
        score = lambda i, j: sum(float(scores[frame_of[n]][blocks[j]].mean()) for n in blocks[i])  # noqa: B023
        number = max(1, round(0.25 * len(video)))
        check_rows(mask[head], blocks, {i: top_k({j: score(i, j) for j in video}, number, own=i) for i in video})


def test_dependent_vectors_add_nothing_to_a_basis():
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(2))
    x[:, :, 3] = 2 * x[:, :, 0] - x[:, :, 1]
    basis = orthonormal_basis(x)
    expected = torch.eye(5) * torch.tensor([1.0, 1, 1, 0, 1])
    assert torch.allclose(basis @ basis.mT, expected.expand(2, 3, 5, 5), atol=1e-5)
    assert torch.allclose(x @ basis.mT @ basis, x, atol=1e-4)


# --- token select


@every_grid
def test_token_select(grid):
    """The votes of three heads for a block are the sums of their weights; every head keeps the same blocks."""
    q, k, _ = qkv(grid.tokens, heads=3, dim=DIM, seed=5)
    q = q * torch.tensor([0.5, 1.0, 6.0])[:, None, None]
    plan, blocks = plan_of(TokenSelect(queries_per_block=8), grid, BLOCK, q, k), blocks_of(grid)
    mask, video = plan.block_mask()[0, 0], video_of(grid, blocks)
    weights = sum(attention_map(q[0, head], k[0, head]) for head in range(3))
    for i in video:
        votes = {j: float(weights[blocks[i][::2]][:, blocks[j]].sum()) for j in video}
        kept = {j for j in video if mask[i, j]}
        assert kept == top_k(votes, len(kept), own=i)
    assert plan.block_mask().shape[1] == 1
    least = TokenSelect().least_density(grid, BLOCK)
    assert plan.density == pytest.approx(max(0.25, least), abs=0.01)


def test_token_select_selects_again_after_the_similarity_fell():
    grid, memory, made, last, selected, fallen = GRIDS[0], {}, [], None, None, True
    direction = torch.randn(DIM, generator=torch.Generator().manual_seed(9))
    means = lambda q: torch.stack([q[0, :, block].double().mean(1) for block in blocks_of(grid)])
    for step in range(9):
        q, k, _ = qkv(grid.tokens, dim=DIM)
        q = q + step * direction / 6
        plan = TokenSelect().plan(q, k, None, Site(grid, BLOCK, step=step), memory)
        assert (plan is not last) == fallen
        made, selected = ([*made, step], q) if fallen else (made, selected)
        fallen = float(torch.cosine_similarity(means(q), means(selected), dim=-1).mean()) < 0.9
        last = plan
    assert 1 < len(made) < 9


# --- deltallm


def moving_keys(grid: Grid) -> Tensor:
    """Keys of which the first rows stand still, the last ones change slowly, and the others jump now and then."""
    generator = torch.Generator().manual_seed(3)
    random = lambda *shape: torch.randn(*shape, DIM, generator=generator)
    speed = torch.linspace(0, 0.6, grid.frame)[:, None]
    frames = [random(1, 2, grid.frame)]
    for number in range(1, grid.frames):
        frames.append(frames[-1] + speed * random(1, 2, grid.frame) * (number % 3 != 0))
    return torch.cat([random(1, 2, grid.before), *frames, random(1, 2, grid.after)], 2)


@every_grid
@pytest.mark.parametrize("density", [None, 0.5])
def test_deltallm(grid, density):
    """Without a density, blocks of the own and the next frames, and others with a mean delta above .6; with one, first
    the nearest blocks of these frames, then those with the largest mean delta."""
    q, k = torch.zeros(1, 2, grid.tokens, DIM), moving_keys(grid)
    method = DeltaLLM(threshold=0.6, density=density)
    mask, blocks = plan_of(method, grid, BLOCK, q, k).block_mask()[0], blocks_of(grid)
    video, frames = video_of(grid, blocks), [sorted(frames_of(grid, block)) for block in blocks]
    for head in range(2):
        keys = k[0, head, grid.before : grid.before + grid.video].double()
        centre, delta = keys.mean(0), [0.0] * grid.tokens
        scale = float((keys - centre).norm(dim=-1).mean())
        for place in range(grid.frame):
            anchor = centre
            for frame in range(grid.frames):
                key = keys[frame * grid.frame + place]
                delta[grid.before + frame * grid.frame + place] = float((key - anchor).norm()) / scale
                if frame == 0 or delta[grid.before + frame * grid.frame + place] >= 0.6:
                    anchor = key
        change = {j: sum(delta[n] for n in blocks[j]) / len(blocks[j]) for j in video}
        for i in video:
            window = [j for j in video if frames[i][0] - frames[j][-1] <= 1 and frames[j][0] - frames[i][-1] <= 1]
            kept = {j for j in video if mask[head, i, j]}
            if density is None:
                assert kept == set(window) | {j for j in video if change[j] > 0.6}
            else:
                nearest = sorted(window, key=lambda j: (abs(i - j), -int(mask[head, i, j])))
                others = ranked({j: change[j] for j in video if j not in window}, set())
                assert kept == set([*nearest, *others][: len(kept)])
    assert mask.all() == (grid.frames == 1 and density is None)


def frames_of(grid: Grid, block: list[int]) -> set[int]:
    return {min(max(n - grid.before, 0), grid.video - 1) // grid.frame for n in block}


# --- nosa


@every_grid
def test_nosa(grid):
    """The own block; half of the others by the attention of sampled queries of the first plan; the rest by products of
    block means of the present queries and keys."""
    memory, method, site = {}, NOSA(agnostic=0.5, density=0.6), Site(grid, BLOCK)
    (first_q, first_k, _), (q, k, _) = (qkv(grid.tokens, dim=DIM, seed=seed) for seed in (1, 2))
    method.plan(first_q, first_k, None, site, memory)
    mask, blocks = method.plan(q, k, None, site, memory).block_mask()[0], blocks_of(grid)
    video, generator = video_of(grid, blocks), torch.Generator().manual_seed(0)
    samples = torch.randint(grid.before, grid.before + grid.video, (64,), generator=generator)
    size = sum(len(blocks[j]) for j in video)
    pairs = 0.6 * grid.tokens**2 - (grid.tokens**2 - size**2)
    number = int(0.5 * (pairs / size**2 * len(video) - 1))
    assert number > 0 or grid.after, "the case is too easy"
    for head in range(2):
        weights = attention_map(first_q[0, head], first_k[0, head])[samples].mean(0)
        received = {j: float(weights[blocks[j]].mean()) for j in video}
        agnostic = set(ranked(received, set())[: max(number, 0)])
        for i in video:
            queries, keys = q[0, head].double(), k[0, head].double()
            aware = {j: float(queries[blocks[i]].mean(0) @ keys[blocks[j]].mean(0)) for j in video}
            kept = {j for j in video if mask[head, i, j]}
            others = [j for j in ranked(aware, set()) if j not in agnostic | {i}]
            assert agnostic | {i} <= kept
            assert kept == agnostic | {i} | set(others[: len(kept) - len(agnostic | {i})])
