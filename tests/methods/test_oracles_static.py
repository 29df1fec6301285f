"""Static patterns and clusters of equal size against the rules of their papers, one pair at a time."""

from __future__ import annotations

import pytest
import torch
from oracles import BLOCK, blocks_of

from dit_sparse import Grid, order
from dit_sparse.methods.patterns.arrow import Arrow
from dit_sparse.methods.patterns.power import Power
from dit_sparse.methods.patterns.svga import SVGA

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
