"""Static patterns and clusters of equal size against the rules of their papers, one pair at a time."""

from __future__ import annotations

import pytest
import torch
from oracles import BLOCK, blocks_of

from attention_cases import plan_of
from dit_sparse import Grid, order
from dit_sparse.methods.patterns.arrow import Arrow
from dit_sparse.methods.patterns.masformer import MASFormer
from dit_sparse.methods.patterns.moa import MoA
from dit_sparse.methods.patterns.power import Power
from dit_sparse.methods.patterns.svga import SVGA
from dit_sparse.methods.patterns.window import Window

GRIDS = [Grid(5, 7, 3, after=11), Grid(5, 7, 3, before=19), Grid(1, 23, 31), Grid(40, 2, 2)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: str(grid).replace(" ", ""))


def check_mask(keep: torch.Tensor, rule) -> None:
    """Assert that a block mask is that of a rule for the numbers of two blocks."""
    blocks = len(keep)
    for i in range(blocks):
        for j in range(blocks):
            assert bool(keep[i, j]) == rule(i, j), f"blocks {i} and {j}"


# --- power


def is_power_of_two(number: int) -> bool:
    return number in {1 << exponent for exponent in range(30)}


@every_grid
@pytest.mark.parametrize("window", [0.0, 2.0, 5.0])
def test_power_in_blocks_is_the_rule_of_the_paper(grid, window):
    keep = Power(by_frame=False, window=window).keep(grid, BLOCK)
    sink = grid.before // BLOCK
    check_mask(keep, lambda i, j: abs(i - j) < window or is_power_of_two(abs(i - j)) or j == sink)


@every_grid
@pytest.mark.parametrize("width", [0.0, 0.3])
def test_power_in_frames(grid, width):
    """A block pair is kept if a pair of its tokens is 1, 2, 4, ... frames apart, to within the width."""
    keep = Power(width=width, sink=False).keep(grid, BLOCK)
    powers = [grid.frame << e for e in range(12) if grid.frame << e < grid.tokens]
    is_wanted = lambda distance: any(abs(distance - power) <= width * grid.frame for power in powers)

    def rule(i, j):
        apart = abs(i - j) * BLOCK
        return apart < grid.frame or any(is_wanted(apart + shift) for shift in range(1 - BLOCK, BLOCK))

    check_mask(keep, rule)


def test_power_doubles_the_receptive_field_with_every_layer():
    """With n layers a block reaches all blocks whose distance is below 2^n."""
    keep = Power(by_frame=False, window=1.0, sink=False).keep(Grid(16, 8, 8), BLOCK).double()
    position, reached = torch.arange(len(keep)), torch.eye(len(keep)).double()
    for layers in range(1, 6):
        reached = (reached @ keep > 0).double()
        distance = (position[:, None] - position).abs()
        assert reached[distance < 2**layers].all()


# --- MobileViG


def nearest_step(distance: int, stride: int) -> int:
    """Distance to the nearest multiple of the stride."""
    return min(abs(distance - stride * m) for m in range(distance // stride + 2))


@every_grid
@pytest.mark.parametrize(("width", "stride"), [(0.0, 2), (0.0, 3), (0.3, 2)])
def test_svga(grid, width, stride):
    """Tiles on one line, every K-th of them; a block pair is kept if its tiles along each axis are."""
    one = SVGA(width=width, stride=stride)
    sides = {Grid(1, 23, 31): (1, 4, 4), Grid(40, 2, 2): (4, 2, 2)}.get(grid, (2, 2, 4))
    assert one.order(grid, BLOCK).equal(order.tiles(grid, *sides))
    coordinates = torch.stack(grid.coordinates(one.order(grid, BLOCK))[:3]).T.tolist()
    sizes = (grid.frames, grid.height, grid.width)
    reach = [width * -(-size // side) for size, side in zip(sizes, sides, strict=True)]
    places = [
        [
            {coordinates[place][axis] // sides[axis] for place in range(first, min(first + BLOCK, grid.tokens))}
            for axis in range(3)
        ]
        for first in range(0, grid.tokens, BLOCK)
    ]

    def rule(i, j):
        gaps = [[abs(a - b) for a in places[i][axis] for b in places[j][axis]] for axis in range(3)]
        near = [min(gaps[axis]) <= reach[axis] for axis in range(3)]
        step = [min(nearest_step(gap, stride) for gap in gaps[axis]) <= reach[axis] for axis in range(3)]
        return any(step[axis] and all(near[other] for other in range(3) if other != axis) for axis in range(3))

    check_mask(one.keep(grid, BLOCK), rule)


def test_svga_of_whole_tiles_is_a_strided_cross():
    """On a grid of whole tiles every tile is a block: rows, columns and frames of every second tile."""
    grid = Grid(10, 16, 12)
    keep = SVGA().keep(grid, 64)
    tiles = [(f, y, x) for f in range(3) for y in range(4) for x in range(3)]
    blocks = {
        tuple(grid.coordinates()[axis][order.tiles(grid, 4, 4, 4)[64 * n]].item() // 4 for axis in range(3)): n
        for n in range(24)
    }
    for a in tiles[:24]:
        for b in tiles[:24]:
            shift = [abs(p - q) for p, q in zip(a, b, strict=True)]
            on_line = sum(s > 0 for s in shift) <= 1 and all(s % 2 == 0 for s in shift)
            assert bool(keep[blocks[a], blocks[b]]) == on_line


# --- arrow


@every_grid
@pytest.mark.parametrize(("band", "plus", "frames"), [(0.05, 0.0, 0.0), (0.1, 0.3, 0.05), (1e-4, 1.0, 1.0)])
def test_arrow(grid, band, plus, frames):
    """A band of block starts, the first tokens as rows and columns, and pairs of boxes on one line."""
    keep = Arrow(band=band, plus=plus, frames=frames).keep(grid, BLOCK)
    sizes, cells = (grid.frames, grid.height, grid.width), torch.stack(grid.coordinates()[:3]).T.tolist()
    boxes = [
        [(min(cells[t][axis] for t in block), max(cells[t][axis] for t in block)) for axis in range(3)]
        for block in blocks_of(grid)
    ]
    is_global = [
        any(grid.before <= token < grid.before + frames * grid.frame for token in range(n * BLOCK, n * BLOCK + BLOCK))
        for n in range(len(boxes))
    ]

    def rule(i, j):
        if abs(i - j) * BLOCK <= band * grid.tokens or is_global[i] or is_global[j]:
            return True
        gaps = [max(b[0] - a[1], a[0] - b[1], 0) for a, b in zip(boxes[i], boxes[j], strict=True)]
        return plus > 0 and any(
            gaps[axis] <= plus * sizes[axis] and all(gaps[other] == 0 for other in range(3) if other != axis)
            for axis in range(3)
        )

    check_mask(keep, rule)


# --- MASFormer


@every_grid
@pytest.mark.parametrize("layers", [1, 6, 24])
@pytest.mark.parametrize("density", [0.15, 0.5, 0.8, 1.0])
def test_masformer_meets_the_density_over_all_layers(grid, layers, density):
    """The first layers are full, the others have one window, and the mean over the layers is the density."""
    one = MASFormer(density=density)
    plans = [plan_of(one, grid, BLOCK, layer=layer, layers=layers) for layer in range(layers)]
    densities = [plan.density for plan in plans]
    full = sum(plan.order is None for plan in plans)
    least = one.least_density(grid, BLOCK)
    assert full <= layers / 3 and full <= max(0.0, density * layers / 2 + 1e-6)
    assert densities[:full] == [1.0] * full and len(set(densities[full:])) == 1
    pair = (BLOCK / grid.tokens) ** 2
    assert sum(densities) / layers == pytest.approx(max(density, least), abs=pair / 2 + 1e-9)
    left = (density * layers - full) / (layers - full)
    assert plans[-1].block_mask().equal(plan_of(Window(density=left), grid, BLOCK).block_mask())


def test_masformer_has_full_layers_where_the_density_allows_them():
    grid = Grid(16, 8, 8)
    counts = [MASFormer(density=density).count_full(grid, BLOCK, 24) for density in (0.02, 0.1, 0.25, 0.5, 1.0)]
    assert counts == [0, 1, 3, 6, 8] and MASFormer().count_full(grid, BLOCK, 24) == 8
    note = MASFormer(density=0.25).density_note(grid, BLOCK, 0.1)
    assert note == "layers with full attention are among those that stay dense"
    assert MASFormer(density=0.25).density_note(grid, BLOCK, 0.251) is None


# --- MoA


@every_grid
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.25), (0.0, 1.0), (3.0, 0.0), (-1.0, 0.5)])
@pytest.mark.parametrize("sink", [True, False])
def test_moa(grid, alpha, beta, sink):
    """Half of alpha + beta F frames on either side of a block, and the first frame."""
    keep = MoA(alpha=alpha, beta=beta, sink=sink).keep(grid, BLOCK)
    first_frame = {token // BLOCK for token in range(grid.before + grid.frame)}

    def rule(i, j):
        frames_apart = abs(i - j) * BLOCK / grid.frame
        return 2 * frames_apart <= alpha + beta * grid.frames or (sink and j in first_frame)

    check_mask(keep, rule)


def test_spans_of_moa_are_linear_in_the_number_of_frames():
    """One pair of settings at three lengths: blocks of one frame, spans of 3 + F / 4 frames."""
    for frames in (8, 16, 32):
        middle = MoA(alpha=3.0, beta=0.25, sink=False).keep(Grid(frames, 4, 4), 16)[frames // 2]
        assert int(middle.sum()) == 2 * int((3 + frames / 4) / 2) + 1
