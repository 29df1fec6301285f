"""Scorers with a threshold, a tree or pooled keys against re-implementations of their papers' rules in float64."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import pytest
import torch
from oracles import BLOCK, attention_map, blocks_of, is_text, mask_of, ranked, top_k, video_of
from torch import Tensor

from attention_cases import plan_of, qkv
from dit_sparse import Above, Grid, Site, Top, attention, order
from dit_sparse.methods import method
from dit_sparse.methods.scorers.anchor import Anchor
from dit_sparse.methods.scorers.flexprefill import FlexPrefill, jensen_shannon
from dit_sparse.methods.scorers.hip import HiP
from dit_sparse.methods.scorers.infllm_v2 import InfLLMV2
from dit_sparse.methods.scorers.sale import SALE, THRESHOLDS
from dit_sparse.methods.scorers.spark import Spark

DIM, HEADS = 16, 2
GRIDS = [Grid(5, 7, 3, after=11), Grid(1, 23, 31), Grid(40, 2, 2), Grid(3, 6, 5, before=20)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: str(grid).replace(" ", ""))
Rows = dict[int, set[int]]


def inputs(grid: Grid, scale: float = 1.0) -> list[Tensor]:
    q, k, v = qkv(grid.tokens, heads=HEADS, dim=DIM, seed=4)
    return [scale * q, k, v]


def assert_kept(mask: Tensor, rows: list[Rows], grid: Grid, sequence: Tensor | None = None) -> None:
    """Assert that the heads of a mask ``[H, Qb, Qb]`` keep these columns in the rows of the video."""
    for head, kept in enumerate(rows):
        assert mask[head].equal(mask_of(kept, blocks_of(grid, sequence))), f"head {head} keeps other blocks"
    assert not mask.all(), "the case is too easy"


def sampled(block: list[int], count: int) -> list[int]:
    """The tokens that stand for a block: spread by the golden ratio; the last token of a shorter block again."""
    places = sorted(int(n * 0.618034 % 1 * BLOCK) for n in range(count)) if count < BLOCK else range(BLOCK)
    return [block[min(place, len(block) - 1)] for place in places]


def best_of_head(scores: dict[tuple[int, int], float], blocks: list[list[int]], pairs: float) -> Rows:
    """The own blocks, then the best block pairs of a head, until the token pairs are met to half a block pair."""
    area = lambda pair: len(blocks[pair[0]]) * len(blocks[pair[1]])
    rows = {i: {i} for i, _ in scores}
    held = sum(len(blocks[i]) ** 2 for i in rows)
    for pair in sorted((pair for pair in scores if pair[0] != pair[1]), key=lambda pair: -scores[pair]):
        if held + area(pair) / 2 > pairs:
            break
        held += area(pair)
        rows[pair[0]].add(pair[1])
    return rows


def video_pairs(grid: Grid, density: float) -> float:
    """The token pairs that a density leaves to the blocks without text."""
    without = sum(len(block) for block in blocks_of(grid) if not is_text(grid, block))
    return density * grid.tokens**2 - (grid.tokens**2 - without**2)


# --- flexprefill


def flexprefill_scores(q, k, grid, probe_blocks, queries):
    """Return the Jensen-Shannon distance, the predicted attention of all pairs, and the attention of columns and
    diagonals."""
    blocks = blocks_of(grid)
    video = video_of(grid, blocks)
    mean = lambda x, i: x[blocks[i]].mean(0)
    predicted = {}
    for i in video:
        logits = [float(mean(q, i) @ mean(k, j)) / math.sqrt(DIM) + math.log(len(blocks[j])) for j in video]
        predicted |= {(i, j): float(p) for j, p in zip(video, torch.tensor(logits).double().softmax(0), strict=True)}
    weights, count = attention_map(q, k), min(probe_blocks, len(video))
    probes = [video[round(n * (len(video) - 1) / (count - 1))] for n in range(count)]
    true, distance = {}, []
    for i in probes:
        mass = [float(weights[sampled(blocks[i], queries)][:, blocks[j]].sum()) for j in video]
        true |= {(i, j): m / sum(mass) for j, m in zip(video, mass, strict=True)}
        middle = {j: (true[i, j] + predicted[i, j]) / 2 for j in video}
        divergence = lambda p, i=i, m=middle: sum(p[i, j] * math.log(p[i, j] / m[j]) for j in video)
        distance.append(math.sqrt((divergence(true) + divergence(predicted)) / 2))
    columns = {}
    for j in video:
        others = [true[i, j] for i in probes if i != j]
        columns[j] = sum(others) / max(1, len(others))
    diagonals = {}
    for d in range(1 - len(video), len(video)):
        seen = [true[i, i + d] for i in probes if i + d in columns]
        diagonals[d] = sum(seen) / len(seen)
    return sum(distance) / len(distance), predicted, columns, diagonals


def before(mass: dict[int, float]) -> dict[int, float]:
    """The share of all greater entries."""
    total = sum(mass.values())
    return {n: sum(other for other in mass.values() if other > m) / total for n, m in mass.items()}


@every_grid
@pytest.mark.parametrize("density", [None, 0.6])
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_flexprefill(grid, density, tau):
    """Query-aware: the fewest best pairs of a head that hold .6 of its rows. Otherwise: the fewest columns that hold .6
    of the attention of the probes, and the fewest diagonals; with a density, the lines with the most attention."""
    q, k, _ = inputs(grid)
    blocks, rows, line_scores = blocks_of(grid), [], []
    video = video_of(grid, blocks)
    for head in range(HEADS):
        distance, predicted, columns, diagonals = flexprefill_scores(
            q[0, head].double(), k[0, head].double(), grid, 5, 4
        )
        assert 0 < distance < 1
        vertical, slash = before(columns), before(diagonals)
        level = {(i, j): min(vertical[j], slash[j - i]) for i, j in product(video, video)}
        line_scores.append({(i, j): max(columns[j], diagonals[j - i]) for i, j in level})
        if density is not None:
            rows.append(best_of_head(predicted, blocks, video_pairs(grid, density)))
        elif tau == 0:
            rows.append({i: {j for j in video if i == j or level[i, j] < 0.6} for i in video})
        else:
            own, held, kept = {(i, i) for i in video}, 0.0, {i: set() for i in video}
            for i, j in sorted(own) + sorted(set(predicted) - own, key=lambda pair: -predicted[pair]):
                if held < 0.6 * len(video):
                    kept[i].add(j)
                    held += predicted[i, j]
            rows.append(kept)
    one = FlexPrefill(gamma=0.6, tau=tau, probe_blocks=5, queries_per_block=4, density=density)
    mask = plan_of(one, grid, BLOCK, q, k).block_mask()[0]
    if density is None or tau:
        assert_kept(mask, rows, grid)
        return
    assert not mask.all()
    for head, scores in enumerate(line_scores):  # pairs of one line are equal, so which of them are kept is unspecified
        dropped = max(score for (i, j), score in scores.items() if not mask[head, i, j])
        assert all(score >= dropped - 1e-6 for (i, j), score in scores.items() if mask[head, i, j] and i != j)


@every_grid
def test_flexprefill_switches_by_head(grid):
    """Heads below tau rank pairs, the others keep lines."""
    q, k, _ = inputs(grid)
    distances = [flexprefill_scores(*(x[0, h].double() for x in (q, k)), grid, 8, 16)[0] for h in range(HEADS)]
    plans = [plan_of(FlexPrefill(tau=tau), grid, BLOCK, q, k).block_mask()[0] for tau in (0, sum(distances) / 2, 1)]
    for head, distance in enumerate(distances):
        assert plans[1][head].equal(plans[2 if distance < sum(distances) / 2 else 0][head])


def test_jensen_shannon_of_distributions_with_zeros():
    first, second = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0]]), torch.tensor([[0.0, 1, 0], [0.5, 0.5, 0]])
    assert jensen_shannon(first, second).tolist() == pytest.approx([math.sqrt(math.log(2)), 0])


# --- anchor


def anchor_scores(q, k, grid):
    """Return the excess of every block over the anchor of its row, and the pairs within the region."""
    blocks, (frame, line, _, _) = blocks_of(grid), grid.coordinates()
    lines = [{int((frame if grid.frames > 1 else line)[token]) for token in block} for block in blocks]
    video, scores = video_of(grid, blocks), {}
    near = lambda a, b: 0 in b or any(abs(x - y) <= 1 for x in a for y in b)
    region = {(i, j) for i, j in product(video, range(len(blocks))) if j not in video or near(lines[i], lines[j])}
    for i in video:
        best = [float((k[block] @ q[blocks[i]].mean(0)).max()) / math.sqrt(DIM) for block in blocks]
        anchor = max(best[j] for j in range(len(blocks)) if (i, j) in region)
        scores |= {(i, j): best[j] - anchor for j in video}
    return scores, region


@every_grid
@pytest.mark.parametrize("density", [None, 0.6])
def test_anchor(grid, density):
    """Blocks of the region, and blocks with a key within .3 of the best key of the region; or the best of the head."""
    q, k, _ = inputs(grid)
    blocks, rows = blocks_of(grid), []
    for head in range(HEADS):
        scores, region = anchor_scores(q[0, head].double(), k[0, head].double(), grid)
        kept = {pair for pair, score in scores.items() if score > -0.3 or pair in region}
        rows.append({i: {j for a, j in kept if a == i} for i in video_of(grid, blocks)})
        if density is not None:
            rows[-1] = best_of_head(scores, blocks, video_pairs(grid, density))
    one = Anchor(budget=Above(-0.3)) if density is None else Anchor(density=density)
    mask = plan_of(one, grid, BLOCK, q, k).block_mask()[0]
    assert_kept(mask, rows, grid)


# --- sale


def round_to_4_bits(x: Tensor) -> Tensor:
    scale = x.abs().max() / 7
    return (x / scale).round() * scale


def sale_scores(q, k, grid, count):
    """Return the largest estimate of every pair relative to sink and local keys."""
    blocks, scale = blocks_of(grid), 1 / math.sqrt(DIM)
    k, mean = k - k.mean(0), q.mean(0)
    keys = torch.stack([round_to_4_bits(key) for key in k])
    video, sink = (
        video_of(grid, blocks),
        {n for n in range(grid.tokens) if n < grid.before + 32 or n >= grid.before + grid.video},
    )
    scores = {}
    for i in video:
        local = {token for j in (i - 1, i, i + 1) if 0 <= j < len(blocks) for token in blocks[j]}
        relative = []
        for r in sampled(blocks[i], count):
            base = (k[sorted(local | sink)] @ q[r] * scale).logsumexp(0)
            relative.append((keys @ round_to_4_bits(q[r] - mean) + k @ mean) * scale - base)
        relative = torch.stack(relative)
        scores |= {(i, j): float(relative[:, blocks[j]].max()) for j in video}
    return scores


@every_grid
def test_sale_with_a_threshold(grid):
    q, k, _ = inputs(grid)
    rows = []
    for head in range(HEADS):
        scores = sale_scores(q[0, head].double(), k[0, head].double(), grid, 4)
        rows.append(
            {i: {j for (a, j), s in scores.items() if a == i and (s > math.log(0.05) or i == j)} for i, _ in scores}
        )
    assert_kept(plan_of(SALE(budget=Above(math.log(0.05))), grid, BLOCK, q, k).block_mask()[0], rows, grid)


@every_grid
@pytest.mark.parametrize("max_error", [0.02, 0.3])
def test_sale_calibrates_every_head(grid, max_error):
    """The greatest threshold whose kept blocks have a small output error on 64 queries; none: the head is dense."""
    q, k, v = inputs(grid, scale=1.5)
    q[:, 1] *= 2  # a head with a sharper map
    blocks, memory, expected = blocks_of(grid), {}, []
    one, site = SALE(max_error=max_error), Site(grid, BLOCK)
    plan = one.plan(q, k, v, site, memory)
    probes = [grid.before + int(n * (grid.video - 1) / 63 + 1e-6) for n in range(64)]
    for head in range(HEADS):
        scores = sale_scores(q[0, head].double(), k[0, head].double(), grid, 4)
        video, (weights, values) = video_of(grid, blocks), (attention_map(q[0, head], k[0, head]), v[0, head].double())
        errors = {}
        for tau in THRESHOLDS:
            difference, total = 0.0, 0.0
            for token in probes:
                row, dense = token // BLOCK, weights[token] @ values
                dropped = {j for j in video if row in video and row != j and scores[row, j] <= math.log(tau)}
                kept = [n for j, block in enumerate(blocks) if j not in dropped for n in block]
                output = weights[token, kept] @ values[kept] / weights[token, kept].sum()
                difference, total = difference + float((output - dense).abs().sum()), total + float(dense.abs().sum())
            errors[tau] = difference / total
        small = [tau for tau in THRESHOLDS if errors[tau] < max_error]
        expected.append(math.log(small[0]) if small else -math.inf)
    assert memory["threshold"][0].tolist() == pytest.approx(expected)
    again = one.plan(q, k, v, site, memory)
    assert plan.block_mask().equal(again.block_mask())


# --- hip


def hip_search(q: Tensor, k: Tensor, blocks: list[list[int]], row: int, video: list[int], width: int) -> list[int]:
    """The blocks of a row that the tree finds, from the best to the worst."""
    cells = [(n * len(video) // width, (n + 1) * len(video) // width) for n in range(width)]
    number = width
    parts = list(range(width))

    def score(low: int, high: int) -> float:
        if low == high:
            return -math.inf
        mean = k[[token for j in video[low:high] for token in blocks[j]]].mean(0)
        return max(float(q[token] @ mean) for token in sampled(blocks[row], 16))

    while number < len(video):
        number *= 2
        parts = [child for part in parts for child in (2 * part, 2 * part + 1)]
        cells = {part: (part * len(video) // number, (part + 1) * len(video) // number) for part in parts}
        parts = sorted(parts, key=lambda part: -score(*cells[part]))[:width]
    if number == width:
        cells = dict(enumerate(cells))
        parts = sorted(parts, key=lambda part: -score(*cells[part]))
    return [video[low] for low, high in (cells[part] for part in parts) if low < high]


@every_grid
@pytest.mark.parametrize("share", [0.15, 0.4])
def test_hip(grid, share):
    q, k, _ = inputs(grid)
    sequence, rows = order.hilbert(grid), []
    blocks = blocks_of(grid, sequence)
    video = video_of(grid, blocks)
    count = max(1, round(share * len(video)))
    for head in range(HEADS):
        rows.append({})
        for i in video:
            width = min(len(video), math.ceil(share * len(video)) + 1)
            found = hip_search(q[0, head].double(), k[0, head].double(), blocks, i, video, width)
            rows[-1][i] = top_k({j: -place for place, j in enumerate(found)} | {i: 1}, count, own=i)
    assert_kept(plan_of(HiP(budget=Top(share)), grid, BLOCK, q, k).block_mask()[0], rows, grid, sequence)


def test_hip_needs_a_number_of_blocks():
    with pytest.raises(ValueError, match=r"budget of hip must be top"):
        HiP(budget=Above(0.0))


def test_hip_keeps_512_keys_without_a_density():
    grid = Grid(8, 12, 16)
    plan = plan_of(HiP(), grid, 64)
    assert (plan.count >= 8).all() and (plan.count <= 9).all()


# --- infllm_v2


@every_grid
@pytest.mark.parametrize("group", [1, 2])
def test_infllm_v2(grid, group):
    """Probabilities of overlapping means of 8 keys relative to means of 32, summed over the heads of a group; the
    greatest of a block; the first block and the neighbours, and the best others."""
    q, k, _ = inputs(grid)
    stride, blocks = 4, blocks_of(grid)
    video, share, overlaps = video_of(grid, blocks), 0.3, {}
    windows = lambda size: [list(range(n, min(n + 2 * size, grid.tokens))) for n in range(0, grid.tokens, size)]
    for j in video:
        overlaps[j] = [n for n, window in enumerate(windows(stride)) if set(window) & set(blocks[j])]
    mass = {}
    for head in range(HEADS):
        fine, coarse = (torch.stack([k[0, head, w].double().mean(0) for w in windows(n * stride)]) for n in (1, 4))
        for i in video:
            queries = q[0, head, sampled(blocks[i], 8)].double() / math.sqrt(DIM)
            mass[head, i] = (queries @ fine.T - (queries @ coarse.T).logsumexp(-1, keepdim=True)).exp().sum(0).tolist()
    one = InfLLMV2(stride=stride, window=2, head_group=group, budget=Top(share))
    mask = plan_of(one, grid, BLOCK, q, k).block_mask()[0]
    for head, i in product(range(HEADS), video):
        heads = range(HEADS) if group == 2 else [head]
        score = {j: max(sum(mass[h, i][n] for h in heads) for n in overlaps[j]) for j in video}
        forced = {j for j in video if abs(i - j) <= 1 or j == video[0]}
        kept = {j for j in video if mask[head, i, j]}
        best = ranked(score, forced)[: max(1, round(share * len(video))) + len(forced)]
        assert forced <= kept and len(kept) == len(best)
        scores = lambda columns, s=score: sorted(s[j] for j in columns)  # neighbours that share a window are equal
        assert scores(kept) == pytest.approx(scores(best))
    assert not mask.all()


def test_infllm_v2_is_dense_below_a_length():
    q, k, v = inputs(GRIDS[0])
    call = partial(attention, q, k, v, grid=GRIDS[0], block=BLOCK, executor="reference")
    dense, _ = call(method="dense")
    assert call(method=InfLLMV2())[0].equal(dense)
    assert not call(method=InfLLMV2(min_tokens=0, selected=1, window=0))[0].allclose(dense, atol=1e-3)
    assert plan_of(InfLLMV2(density=0.5), GRIDS[0], BLOCK).density == pytest.approx(0.5, abs=0.02)


# --- spark


@every_grid
@pytest.mark.parametrize("keys", [4, 40])
def test_spark(grid, keys):
    """Blocks with a key above mean + std * quantile of the scores of the first half of the channels."""
    q, k, _ = inputs(grid)
    blocks, rows = blocks_of(grid), []
    video = video_of(grid, blocks)
    tokens = sum(len(blocks[j]) for j in video)
    quantile = float(torch.special.ndtri(torch.tensor(1 - keys / tokens, dtype=torch.float64)))
    for head in range(HEADS):
        first, second = (x[0, head, :, : DIM // 2].double() for x in (q, k))
        rows.append({})
        for i in video:
            x = second @ first[blocks[i]].mean(0)
            seen = x[grid.before : grid.before + grid.video]
            threshold = seen.mean() + seen.std(correction=0) * quantile
            rows[-1][i] = {j for j in video if i == j or float(x[blocks[j]].max()) > threshold}
    assert_kept(plan_of(Spark(keys=keys), grid, BLOCK, q, k).block_mask()[0], rows, grid)


def test_spark_keeps_all_of_few_keys():
    assert plan_of(Spark(), Grid(3, 5, 7), BLOCK).block_mask().all()


@every_grid
@pytest.mark.parametrize("name", ["anchor", "sale", "spark", "flexprefill"])
def test_rows_of_a_head_share_its_pairs(name, grid):
    """Every head has the density, but its rows differ."""
    q, k, _ = inputs(grid, scale=2)
    plan = plan_of(method(name, density=0.6), grid, BLOCK, q, k)
    half_a_pair = (BLOCK / grid.tokens) ** 2 / 2
    assert (plan.density_by_head - 0.6).abs().max() <= half_a_pair + 1e-6
    assert plan.count.max() - plan.count.min() > 1
