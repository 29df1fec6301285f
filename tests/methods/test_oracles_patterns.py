"""Patterns against short re-implementations of the rules of their papers, one token pair at a time.

Radial attention and the window have theirs in ``test_patterns.py``.
"""

from __future__ import annotations

from math import ceil, floor

import pytest
import torch
from oracles import BLOCK, GRIDS, attention_map, blocks_of, is_text

from attention_cases import plan_of, qkv
from dit_sparse import Grid, order
from dit_sparse.methods.patterns.neighborhood import Neighborhood, sliding_tile
from dit_sparse.methods.patterns.sink import Sink
from dit_sparse.methods.patterns.svg import SVG, Band, Temporal
from dit_sparse.methods.patterns.vdit import VDiT, Vertical

every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: str(grid).replace(" ", ""))


# --- generalized neighborhood attention


def attends(query: int, key: int, size: int, window: int, stride: int, dilation: int) -> bool:
    """The rule of GNA for two tokens of one axis."""
    if query % dilation != key % dilation:
        return False
    line = [token for token in range(size) if token % dilation == query % dilation]
    window = min(window, len(line))
    left, right = window // 2, ceil(window / 2) - 1
    leader = min(stride * floor(query // dilation / stride) + stride // 2, len(line) - 1)
    centre = max(min(leader, len(line) - 1 - right), left)
    return centre - left <= key // dilation <= centre + right


@every_grid
@pytest.mark.parametrize(
    ("method", "strides", "dilations"),
    [
        (Neighborhood(window=0.4, tile=(1, 4, 4)), (1, 1, 1), (1, 1, 1)),
        (Neighborhood(window=0.3, stride=(1, 2, 3), tile=(2, 2, 4)), (1, 2, 3), (1, 1, 1)),
        (Neighborhood(window=0.3, dilation=(1, 2, 2), tile=(1, 4, 4)), (1, 1, 1), (1, 2, 2)),
        (sliding_tile(window=0.3, tile=(1, 4, 4)), (1, 4, 4), (1, 1, 1)),
    ],
    ids=["neighborhood", "strided", "dilated", "sliding tile"],
)
def test_neighborhood(grid, method, strides, dilations):
    """A block pair is computed if a pair of its coordinates along every axis is in the windows."""
    sizes = (grid.frames, grid.height, grid.width)
    frame, row, column, _ = grid.coordinates()
    cells = list(zip(frame.tolist(), row.tolist(), column.tolist(), strict=True))
    blocks = blocks_of(grid, order.tiles(grid, *method.tile))
    keep = method.keep(grid, BLOCK)
    for i, queries in enumerate(blocks):
        for j, keys in enumerate(blocks):
            near = [
                any(
                    attends(a, b, size, ceil(0.4 * size if method.window == 0.4 else 0.3 * size), stride, dilation)
                    for a in {cells[token][axis] for token in queries}
                    for b in {cells[token][axis] for token in keys}
                )
                for axis, (size, stride, dilation) in enumerate(zip(sizes, strides, dilations, strict=True))
            ]
            assert keep[i, j] == all(near)


# --- svg, vdit and sink


@every_grid
@pytest.mark.parametrize("density", [0.35, 0.6])
def test_svg_bands(grid, density):
    """Both kinds of heads keep one band of blocks around the diagonal, the spatial ones frame by frame, the temporal
    ones place by place; the outermost diagonals of the band are filled up to the density."""
    by_place = sorted(range(grid.video), key=lambda token: (token % grid.frame, token // grid.frame))
    place_order = torch.tensor([grid.before + token for token in by_place])
    expected = torch.cat([torch.arange(grid.before), place_order, torch.arange(grid.before + grid.video, grid.tokens)])
    assert Temporal().order(grid, BLOCK).equal(expected)
    text = torch.tensor([is_text(grid, block) for block in blocks_of(grid)])
    for band in (Band(density=density), Temporal(density=density)):
        mask = band.block_mask(grid, BLOCK)
        assert mask[text].all() and mask[:, text].all()
        video = mask[~text][:, ~text]
        distance = (torch.arange(len(video))[:, None] - torch.arange(len(video))).abs()
        reach = max(int(d) for d in distance.unique() if video[distance == d].all())
        assert not video[distance > reach + 1].any() and video[distance <= reach].all()


@every_grid
def test_svg_takes_the_band_that_keeps_more_attention(grid):
    """Of random queries: each head on its own, token by token."""
    q, k, _ = qkv(grid.tokens, heads=4, dim=16, seed=3)
    codes = torch.randn(grid.frame, 16, generator=torch.Generator().manual_seed(8))
    place = codes[(torch.arange(grid.tokens) - grid.before) % grid.frame]  # two heads attend to their own place
    q[:, 2:] += 2 * place
    k[:, 2:] += 2 * place
    plan = plan_of(SVG(density=0.4), grid, BLOCK, q, k)
    rows = torch.randint(grid.before, grid.before + grid.video, (64,), generator=torch.Generator().manual_seed(0))
    orders = [torch.arange(grid.tokens), Temporal().order(grid, BLOCK)]
    mask = Band(density=0.4).block_mask(grid, BLOCK)
    choices = set()
    for head in range(4):
        weights, kept = attention_map(q[0, head], k[0, head]), []
        for sequence in orders:
            position = {token: place for place, token in enumerate(sequence.tolist())}
            kept.append(
                sum(
                    float(weights[row, token])
                    for row in rows.tolist()
                    for token in range(grid.tokens)
                    if mask[position[row] // BLOCK, position[token] // BLOCK]
                )
            )
        choices.add(kept[1] > kept[0])
        assert plan.order[0, head].equal(orders[kept[1] > kept[0]])
    assert len(choices) == 2, "both kinds occur"


@every_grid
def test_vdit_takes_the_mode_that_keeps_most_attention(grid):
    q, k, _ = qkv(grid.tokens, heads=3, dim=16, seed=5)
    plan = plan_of(VDiT(density=0.4), grid, BLOCK, q, k)
    rows = torch.randint(grid.before, grid.before + grid.video, (64,), generator=torch.Generator().manual_seed(0))
    modes = [plan_of(mode(density=0.4), grid, BLOCK, q, k) for mode in (Band, Temporal, Vertical)]
    tokens = torch.arange(grid.tokens)
    for head in range(3):
        weights = attention_map(q[0, head], k[0, head])[rows]
        masks = [mode.token_mask(tokens)[0, min(head, mode.index.shape[1] - 1)] for mode in modes]
        best = max(masks, key=lambda mask: float((weights * mask[rows]).sum()))
        assert plan.token_mask(tokens)[0, head].equal(best)


@every_grid
@pytest.mark.parametrize("frames", [0.5, 1.0, 2.0])
def test_sink(grid, frames):
    """Blocks that hold a token of the first frames are keys of every query."""
    keep = Sink(frames=frames).keep(grid, BLOCK)
    for j, keys in enumerate(blocks_of(grid)):
        holds = any(grid.before <= token < grid.before + frames * grid.frame for token in keys)
        assert (keep[:, j] == holds).all()


def test_grids_have_text_and_a_ragged_block():
    assert any(grid.after for grid in GRIDS) and any(grid.tokens % BLOCK for grid in GRIDS) and Grid(4, 8, 12) in GRIDS
