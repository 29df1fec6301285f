"""Patterns against their rules, evaluated token by token."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from attention_cases import grids, make, plan_of
from dit_sparse import Grid
from dit_sparse.methods.patterns.neighborhood import Neighborhood, neighbors, sliding_tile
from dit_sparse.methods.patterns.radial import Radial
from dit_sparse.methods.patterns.window import Window

# --- radial: the rule of the authors' released masks (radial_attn/attn_mask.py)


def radial_mask(
    grid: Grid, block: int, decay: float, dense_distance: int, min_width: float, sink: bool
) -> torch.Tensor:
    """Draw each pair of frames as an s x s mask, paste it into whole blocks, round each block, and unite all."""
    size, blocks = grid.frame, -(-grid.tokens // block)
    power, token = 2 ** size.bit_length(), torch.arange(size)
    apart = (token[:, None] - token).abs()
    result = torch.zeros(blocks, blocks, dtype=torch.bool)
    for i in range(grid.frames):
        for j in range(grid.frames):
            distance = abs(i - j)
            length = power / 2 ** distance.bit_length()
            width = size if distance <= dense_distance else max(decay * length, min_width * block)
            thinned = length < block and distance % int(block / length)
            mask = torch.ones_like(apart, dtype=torch.bool) if sink and j == 0 else (apart <= width) & (not thinned)
            (top, y), (left, x) = divmod(grid.before + i * size, block), divmod(grid.before + j * size, block)
            mask = F.pad(mask, (x, -(x + size) % block, y, -(y + size) % block))
            rows = mask.unflatten(1, (-1, block)).unflatten(0, (-1, block)).sum(1)  # of each column: [Qb, Kb, block]
            high, touched = (3 * rows > block).sum(-1), (rows > 0).sum(-1)
            keep = 5 * high > 3 * touched
            result[top : top + len(keep), left : left + keep.shape[1]] |= keep
    return result


def blocks_of_frames(grid: Grid, block: int, frames: int) -> torch.Tensor:
    """Return which blocks hold a token of the first frames."""
    token = torch.arange(grid.tokens)
    inside = (token >= grid.before) & (token < grid.before + frames * grid.frame)
    return torch.tensor([bool(part.any()) for part in inside.split(block)])


RADIAL_GRIDS = [
    Grid(5, 7, 3, after=11),
    Grid(4, 6, 5, before=3),
    Grid(9, 8, 10),
    Grid(1, 9, 7),
    Grid(2, 16, 16),
    Grid(7, 10, 13, after=20),
    Grid(6, 9, 15, before=37),
    Grid(20, 5, 5),
    Grid(12, 8, 16),
    Grid(5, 17, 19, before=5, after=50),
]


@pytest.mark.parametrize("grid", RADIAL_GRIDS, ids=lambda grid: str(grid).replace(" ", ""))
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("sink", [True, False], ids=["sink", "no_sink"])
@pytest.mark.parametrize("decay, distance, width", [(0.95, 1, 1.0), (0.2, 1, 1.0), (0.8, 0, 0.5), (3.0, -1, 0.0)])
def test_radial_follows_the_released_rule(grid, block, sink, decay, distance, width):
    settings = dict(decay=decay, dense_distance=distance, min_width=width, sink=sink)
    expected = radial_mask(grid, block, **settings)
    if sink:  # every query keeps frame 0, even if rounding a small frame to blocks would lose it
        first_frame = blocks_of_frames(grid, block, 1)
        expected |= blocks_of_frames(grid, block, grid.frames)[:, None] & first_frame
    assert Radial(**settings).keep(grid, block).equal(expected)


@given(
    grids(max_side=9, max_text=40),
    st.sampled_from([8, 16, 24]),
    st.floats(0.01, 20),
    st.integers(-1, 3),
    st.floats(0, 2),
)
def test_radial_follows_the_released_rule_on_random_grids(grid, block, decay, distance, width):
    settings = dict(decay=decay, dense_distance=distance, min_width=width, sink=False)
    assert Radial(**settings).keep(grid, block).equal(radial_mask(grid, block, **settings))


@pytest.mark.parametrize("grid", [Grid(12, 8, 16), Grid(7, 10, 13, after=20), Grid(5, 17, 19)], ids=str)
def test_sink_of_the_released_rule_is_complete_where_frames_fill_blocks(grid):
    block = 32
    settings = dict(decay=0.5, dense_distance=1, min_width=1.0, sink=True)
    full = torch.arange(-(-grid.tokens // block)) < grid.tokens // block  # a shorter last block may have too few rows
    assert Radial(**settings).keep(grid, block)[full].equal(radial_mask(grid, block, **settings)[full])


# --- window


@given(grids(), st.sampled_from([8, 16]), st.floats(0.01, 1) | st.sampled_from([0.25, 0.5, 1.0]))
def test_window_compares_the_boxes_of_blocks(grid, block, radius):
    """Boxes are at least as near as the nearest tokens of two blocks."""
    method = Window(radius=radius)
    *axes, _ = (part.split(block) for part in grid.coordinates(method.order(grid, block)))
    limits = [radius * length for length in (grid.frames, grid.height, grid.width)]
    blocks = range(len(axes[0]))
    boxes, tokens = (torch.zeros(len(blocks), len(blocks), dtype=torch.bool) for _ in range(2))
    for i in blocks:
        for j in blocks:
            apart = [(axis[i][:, None] - axis[j]).abs() for axis in axes]
            tokens[i, j] = torch.stack([a <= limit for a, limit in zip(apart, limits, strict=True)]).all(0).any()
            spans = [[range(int(a[n].min()), int(a[n].max()) + 1) for n in (i, j)] for a in axes]
            gaps = [max(0, x.start - y.stop + 1, y.start - x.stop + 1) for x, y in spans]
            boxes[i, j] = all(gap <= limit for gap, limit in zip(gaps, limits, strict=True))
    keep = method.keep(grid, block)
    assert keep.equal(boxes) and (keep | ~tokens).all()


@pytest.mark.parametrize("radius", [0.05, 0.125, 0.5, 1.0])
def test_window_is_exact_where_blocks_are_cubes(radius):
    grid, block = Grid(8, 8, 8), 64
    method = Window(radius=radius)
    cells = torch.stack(grid.coordinates(method.order(grid, block))[:3], -1).split(block)
    near = lambda a, b: ((a[:, None] - b).abs() <= radius * 8).all(-1).any()
    assert method.keep(grid, block).equal(torch.tensor([[near(a, b) for b in cells] for a in cells]))


# --- neighborhood


@given(st.integers(1, 40), st.data())
def test_every_token_has_exactly_its_window(size, data):
    dilation = data.draw(st.integers(1, size))
    window = data.draw(st.integers(1, max(1, size // dilation)))
    stride = data.draw(st.integers(1, window))
    near = neighbors(size, window, stride, dilation)
    assert (near.sum(-1) == window).all()
    token = torch.arange(size)
    assert not near[(token[:, None] - token) % dilation != 0].any()
    if stride == 1 and dilation == 1:
        half = window // 2
        inside = (token >= half) & (token < size - half)
        apart = (token[:, None] - token).abs()
        assert near.diagonal().all() and not near[inside][:, :][apart[inside] > half].any()


def test_queries_of_a_stride_share_their_window():
    near = neighbors(24, 6, stride=3)
    assert all(near[i].equal(near[i // 3 * 3]) for i in range(24))
    blocked = neighbors(24, 6, stride=6)
    assert blocked.equal((torch.arange(24)[:, None] // 6) == torch.arange(24) // 6)


def block_pairs(pairs: torch.Tensor, block: int) -> torch.Tensor:
    """Return the number of kept token pairs of each block pair."""
    missing = -len(pairs) % block
    pairs = F.pad(pairs.float(), (0, missing, 0, missing))
    return pairs.unflatten(1, (-1, block)).sum(-1).unflatten(0, (-1, block)).sum(1)


@given(grids(), st.sampled_from([8, 16]), st.sampled_from([0.3, 0.6, 1.0]), st.booleans())
def test_a_block_pair_is_kept_if_any_of_its_token_pairs_is(grid, block, window, whole_tiles):
    """Axis by axis, so more block pairs may be kept."""
    method = (sliding_tile if whole_tiles else Neighborhood)(window=window)
    coordinates = grid.coordinates(method.order(grid, block))
    sides = method._tile(grid, block)
    pairs = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    for axis, size in enumerate((grid.frames, grid.height, grid.width)):
        near = neighbors(size, math.ceil(window * size), sides[axis] if whole_tiles else 1)
        pairs &= near[coordinates[axis][:, None], coordinates[axis]]
    keep = method.keep(grid, block)
    assert (keep | (block_pairs(pairs, block) == 0)).all()
    if window == 1.0:
        assert keep.all()


def test_sliding_tiles_that_divide_the_grid_keep_whole_blocks():
    """If tiles fill blocks and windows are odd numbers of tiles, kept blocks hold only kept pairs."""
    grid, method = Grid(8, 16, 16), sliding_tile(window=0.75, tile=(2, 4, 4))
    coordinates = grid.coordinates(method.order(grid, 32))
    pairs = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    for axis, size, tile in ((0, 8, 2), (1, 16, 4), (2, 16, 4)):
        pairs &= neighbors(size, int(0.75 * size), tile)[coordinates[axis][:, None], coordinates[axis]]
    sums = block_pairs(pairs, 32)
    assert ((sums == 0) | (sums == 32 * 32)).all() and method.keep(grid, 32).equal(sums > 0)
    assert method.window_density(grid, 32) == pytest.approx(plan_of(method, grid, 32).density) == 0.75**3


@given(grids(), st.floats(0.1, 1), st.integers(1, 2))
def test_window_density_counts_the_pairs_in_windows(grid, window, dilation):
    method = Neighborhood(window=window, dilation=(1, dilation, 1))
    video = [axis[grid.before : grid.before + grid.video] for axis in grid.coordinates()[:3]]
    pairs = torch.ones(grid.video, grid.video, dtype=torch.bool)
    axes = zip(video, (grid.frames, grid.height, grid.width), (1, dilation, 1), strict=True)
    for coordinate, size, apart in axes:
        near = neighbors(size, math.ceil(window * size), 1, apart)
        pairs &= near[coordinate[:, None], coordinate]
    density = method.window_density(grid, 16)
    assert density == pytest.approx(float(pairs.double().mean()))
    assert plan_of(method, grid, 16).density >= density * grid.video**2 / grid.tokens**2 - 1e-9


# --- random blocks


def test_random_blocks_depend_on_layer_head_and_seed_alone():
    keep = lambda layer=0, step=0, seed=0: plan_of(
        make("random_blocks", density=0.3, seed=seed), Grid(6, 8, 8), 16, layer=layer, step=step
    ).block_mask()
    first = keep()
    assert first.shape[:2] == (1, 2) and not first[0, 0].equal(first[0, 1])
    assert first.equal(keep(step=7))
    assert not first.equal(keep(layer=1)) and not first.equal(keep(seed=1))
