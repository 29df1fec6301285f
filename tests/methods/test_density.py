"""The law of density: all methods compute the requested fraction of the pairs, text included."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_cases import BlockMeans, make, plan_of, qkv
from dit_sparse import METHODS, ClusterPlan, Grid, Pattern, Scorer, Site
from dit_sparse.density import VideoBlocks, keep_pairs, pair_weights
from dit_sparse.method import Method
from dit_sparse.methods import method
from dit_sparse.methods.patterns.radial import Radial

GRIDS = [
    Grid(9, 8, 10, after=40), Grid(12, 12, 8), Grid(13, 9, 11), Grid(13, 9, 11, before=17, after=5), Grid(7, 5, 3),
    Grid(4, 6, 5, before=3),
]  # fmt: skip
BLOCKS = [64, 32, 16, 64, 16, 32]  # one for each grid
DENSITIES = [0.03, 0.15, 0.3, 0.55, 1.0]
NAMES = [*METHODS, "svg.spatial", "svg.temporal", "vdit.vertical", "block_means", "radial|sink", "cached(svg2)"]
ONE_COUNT = [name for name in NAMES if isinstance(make(name), Scorer) and not make(name).selects_by_head]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: str(grid).replace(" ", ""))


def half_a_pair(grid: Grid, block: int) -> float:
    """Half a pair of blocks, as a fraction of all pairs."""
    return (min(block, grid.tokens) / grid.tokens) ** 2 / 2


def tolerance(one: Method, grid: Grid, block: int) -> float:
    """Half a pair of blocks; .01 if that is more and the method depends on q and k."""
    half = half_a_pair(grid, block)
    return half + 1e-9 if isinstance(one, Pattern) else max(0.01, half)


def least_density(one: Method, grid: Grid, block: int, plan: ClusterPlan) -> float:
    """The pairs that a method keeps whatever the density; of clusters, also the best one of every row."""
    least = one.least_density(grid, block)
    return least + float(plan.key_sizes.max()) / grid.tokens if one.makes_cluster_plans else least


@pytest.mark.parametrize(("grid", "block"), list(zip(GRIDS, BLOCKS, strict=True)), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_all_methods_meet_the_density_or_name_the_exception(name, grid, block):
    if make(name).density_exception:
        assert name in ("dense", "rettention", "seqboat")  # computes every pair; adds dense calls; whole rows
        return
    q, k, _ = qkv(grid.tokens, batch=2, dim=16)
    achieved = []
    for density in DENSITIES:
        one = make(name, density=density)
        plan = plan_of(one, grid, block, q, k)
        achieved.append(plan.density)
        if density >= (least := least_density(one, grid, block, plan)):
            assert achieved[-1] == pytest.approx(density, abs=tolerance(one, grid, block))
        else:
            assert achieved[-1] <= least + 1e-9, "only the required pairs are kept"
            assert achieved[-1] == pytest.approx(least) or not isinstance(one, Pattern)
    assert achieved == sorted(achieved) or make(name).makes_cluster_plans
    assert achieved[-1] == pytest.approx(1)


SIDE, TEXT = st.integers(1, 5), st.one_of(st.just(0), st.integers(1, 30))


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["block_means", "asa(samples=4)", "random_blocks", "sol", "window", "neighborhood", "radial"]),
    st.builds(Grid, SIDE, SIDE, SIDE, before=TEXT, after=TEXT), st.sampled_from([7, 16, 32]), st.floats(0.02, 1),
)  # fmt: skip
def test_short_sequences_meet_the_density_to_half_a_pair_of_blocks(name, grid, block, density):
    one = make(name, density=density)
    plan = plan_of(one, grid, block, *qkv(grid.tokens, batch=1, dim=8)[:2])
    target = max(density, one.least_density(grid, block))
    assert plan.density == pytest.approx(target, abs=max(0.01, half_a_pair(grid, block)) + 1e-6)


@every_grid
@pytest.mark.parametrize("name", ONE_COUNT)
def test_rows_keep_the_same_number_of_blocks_or_one_more(name, grid):
    """A row keeps more only if more of its blocks are required or have a score of +inf."""
    q, k, _ = qkv(grid.tokens, dim=8)
    one, required = make(name, density=0.4), make(name).required(grid, 16)
    plan = plan_of(one, grid, 16, q, k)
    order = one.order(grid, 16)
    ordered = (q, k) if order is None else (q[:, :, order], k[:, :, order])
    always = (required | one.score(*ordered, ordered[1], Site(grid, 16), {}).isposinf()).sum(-1)
    chosen = plan.count[plan.count > always]
    assert not len(chosen) or chosen.max() - chosen.min() <= 1 + (grid.tokens % 16 > 0)


@every_grid
@pytest.mark.parametrize("name", NAMES)
def test_every_row_keeps_video_at_the_least_density(name, grid):
    """Also with more text than the density allows, and with text that is all padding."""
    one = make(name, density=0.001)
    mask = plan_of(one, grid, 16).token_mask(torch.arange(grid.tokens))
    text = grid.coordinates()[3]
    assert mask[..., ~text, :][..., ~text].any(-1).all()
    assert mask[..., text, :].all() and mask[..., text].all()


@given(st.integers(0, 10_000), st.floats(0.01, 1), st.booleans())
def test_groups_of_any_size_meet_the_pairs(seed, density, equal):
    """Random sizes, required groups and scores of +inf; the sum is exact to half a pair of groups where the required
    groups leave anything to choose."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randint(1, 40, (2,), generator=generator).tolist()
    sizes = lambda n: torch.full((n,), 16) if equal else torch.randint(1, 33, (1, 2, n), generator=generator)
    row_sizes, column_sizes = sizes(rows), sizes(columns)
    scores = torch.randn(1, 2, rows, columns, generator=generator)
    scores[torch.rand(scores.shape, generator=generator) < 0.1] = torch.inf
    required = torch.rand(rows, columns, generator=generator) < 0.2
    area = row_sizes[..., None] * column_sizes[..., None, :]
    pairs = (area.expand(1, 2, -1, -1).sum((-2, -1)) * density).double()
    keep = keep_pairs(scores, pairs, row_sizes, column_sizes, required, equal, ragged=not equal)
    always = required | scores.isposinf()
    held, least = (area * keep).sum((-2, -1)), (area * always).sum((-2, -1))
    slack = 128 if equal else 16 * int(row_sizes.sum(-1).max())
    assert ((held - pairs.maximum(least)).abs() <= slack).all() and (keep | ~always).all()
    worst = scores.masked_fill(~keep, torch.inf).masked_fill(always, torch.inf).amin(-1)
    assert (scores.masked_fill(keep, -torch.inf).amax(-1) <= worst).all(), "the best groups are kept"


@given(st.integers(0, 10_000), st.builds(Grid, SIDE, SIDE, SIDE, before=TEXT, after=TEXT), st.floats(0.01, 1))
def test_one_threshold_for_all_rows_of_a_head(seed, grid, density):
    """The best pairs of a head are kept, whatever their rows, and the own block of each row."""
    blocks = VideoBlocks.from_grid(grid, 7)
    count, own = len(blocks.sizes), blocks.own
    if count == 0:
        return
    scores = torch.randn(1, 2, count, count, generator=torch.Generator().manual_seed(seed))
    keep, area = blocks.keep_by_head(scores, blocks.pairs(density)), blocks.sizes[:, None] * blocks.sizes
    assert (keep | ~own).all()
    kept = scores.masked_fill(~keep | own, torch.inf).amin((-2, -1))
    assert (scores.masked_fill(keep, -torch.inf).amax((-2, -1)) <= kept).all()
    target = max(blocks.pairs(density), blocks.own_pairs)
    assert ((area * keep).sum((-2, -1)) - target).abs().max() <= 49 / 2 + 1e-3


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 40), st.integers(0, 40), st.sampled_from([7, 16, 64]))
def test_video_blocks_hold_no_text(frames, side, before, after, block):
    grid = Grid(frames, side, side, before=before, after=after)
    blocks, text = VideoBlocks.from_grid(grid, block), grid.coordinates()[3].split(block)
    numbers = [n for n, part in enumerate(text) if not part.any()]
    assert numbers == (list(range(len(text))) if blocks.index is None else blocks.index.tolist())
    assert blocks.sizes.tolist() == [len(text[n]) for n in numbers] and blocks.tokens == blocks.sizes.sum()
    assert blocks.own_pairs == (blocks.sizes**2).sum()
    text_pairs = grid.tokens**2 - blocks.tokens**2
    assert blocks.pairs(0.5) == pytest.approx(grid.tokens**2 / 2 - text_pairs)


# --- the settings that a density is solved to


@every_grid
@pytest.mark.parametrize(
    "name", ["radial", "radial(sink=true)", "window", "neighborhood", "svg.temporal", "radial|sink"]
)
def test_resolved_settings_give_the_mask_but_for_single_blocks(name, grid):
    for density in (0.2, 0.35, 0.7):
        one = make(name, density=density)
        resolved = one.resolve(grid, 16)
        assert resolved.density is None and type(resolved) is type(one)
        mask, solved = resolved.block_mask(grid, 16), one.block_mask(grid, 16)
        is_met = float(pair_weights(grid, 16)[mask].sum()) <= density
        assert ((solved | ~mask) if is_met else (mask | ~solved)).all(), "single blocks are added, or left out"


def test_methods_without_settings_to_solve_resolve_to_themselves():
    for name in ("svg2", "adaspa(density=0.3)", "cached(svg)", "radial", "pooled"):
        assert method(name).resolve(Grid(4, 8, 8), 16) == method(name)
    inner = method("cached(pooled(window))", density=0.3).resolve(Grid(4, 8, 8), 16).inner.inner
    assert inner == method("window", density=0.3).resolve(Grid(4, 8, 8), 16)


def test_radial_narrows_windows_before_it_gives_up_near_frames():
    """Below the density of the narrowest windows of a block, first the windows get narrower than a block."""
    grid = Grid(21, 20, 20)
    resolved = [Radial(density=density).resolve(grid, 64) for density in (0.6, 0.3, 0.25, 0.12, 0.05)]
    assert [one.dense_distance for one in resolved] == [1, 1, 1, 0, -1]
    assert resolved[0].min_width == 1 and resolved[0].decay > 0.1
    for first, second in pairwise(resolved[:3]):
        assert second.min_width < first.min_width or second.decay < first.decay
    assert all(one.decay == 1e-4 for one in resolved if one.min_width < 1)


def test_a_density_counts_all_pairs():
    """Rows and columns of text are paid for by the video."""
    with_text, without = Grid(8, 8, 8, after=64), Grid(8, 8, 8)
    video = lambda grid: plan_of(BlockMeans(density=0.5), grid, 16).token_mask(torch.arange(512))[..., :512]
    assert video(without).double().mean() == pytest.approx(0.5, abs=0.01)
    share = 64 / 576
    assert video(with_text).double().mean() == pytest.approx((0.5 - 1 + (1 - share) ** 2) / (1 - share) ** 2, abs=0.01)
