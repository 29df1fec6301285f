"""Grid, blocks and token orders."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention_cases import grids
from dit_sparse import Grid, Site, order
from dit_sparse.grid import Blocks, Span

ORDERS = {
    "row_major": order.row_major,
    "frame_last": order.frame_last,
    "tiles 2x3x2": lambda grid: order.tiles(grid, 2, 3, 2),
    "hilbert": order.hilbert,
    "gilbert": order.gilbert,
    "nested boxes": order.nested_boxes,
}

# --- grid


@given(grids())
def test_grids_are_parsed_and_printed(grid):
    shape = f"{grid.frames}x{grid.height}x{grid.width}"
    assert Grid.parse(f"{grid.before}+{shape}+{grid.after}") == grid
    assert Grid.parse(f" {grid.before} + {shape} + {grid.after}") == grid
    assert Grid.parse(shape) == Grid(grid.frames, grid.height, grid.width)
    assert shape in str(grid) and eval(repr(grid)) == grid
    for text in (grid.before, grid.after):
        assert not text or f"{text} text" in str(grid)


@pytest.mark.parametrize(
    "text", ["", "21x45", "21x45x80x2", "axbxc", "1x2x3-4", "0x4x4", "1x2x3+", "1.5x2x3", "1e3x2x3"]
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="grid"):
        Grid.parse(text)


@pytest.mark.parametrize("text", [None, 5, b"1x2x3", "x" * 10**6, "9" * 5000 + "x1x1", "٣x٤x٥"], ids=range(6))
def test_other_inputs_are_refused_in_a_short_sentence(text):
    with pytest.raises(ValueError, match="cannot read the grid") as error:
        Grid.parse(text)
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


def test_a_grid_has_at_most_as_many_tokens_as_a_plan_can_number():
    assert Grid(2**31 - 1, 1, 1).tokens == 2**31 - 1
    for frames in (2**31, 10**400):
        with pytest.raises(ValueError, match="at most 2147483647 tokens"):
            Grid(frames, 1, 1)


def test_whole_numbers_of_other_types_become_int():
    """Plans are cached by grid: the sizes of an equal grid must not have another type."""
    assert type(Grid(torch.tensor(2), 3, 4).frames) is int


@pytest.mark.parametrize("shape", [(0, 1, 1), (1, -1, 1), (1, 1, 1, -1), (1, 1, 1, 0, -1)])
def test_a_grid_needs_video_tokens(shape):
    with pytest.raises(ValueError, match="at least 1x1x1"):
        Grid(*shape)


@pytest.mark.parametrize("value", [2.0, "2", None, True, float("nan"), (2,)])
def test_a_grid_holds_whole_numbers(value):
    for name in ("frames", "height", "width", "before", "after"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of tokens, got"):
            Grid(**{"frames": 1, "height": 1, "width": 1, name: value})


@given(grids())
def test_coordinates_are_row_major(grid):
    *axes, text = (axis.tolist() for axis in grid.coordinates())
    cells = list(zip(*axes, strict=True))
    video = list(product(range(grid.frames), range(grid.height), range(grid.width)))
    assert cells == [video[0]] * grid.before + video + [video[-1]] * grid.after
    assert text == [True] * grid.before + [False] * grid.video + [True] * grid.after
    assert len(cells) == grid.tokens


@given(grids(), st.sampled_from(["before", "after"]), st.integers(0, 30))
def test_with_text_has_the_length(grid, side, text):
    longer = grid.with_text(grid.video + text, side)
    assert longer.tokens == grid.video + text and getattr(longer, side) == text
    assert grid.with_text(grid.video - 1, side) is None
    assert (grid.with_text(grid.video + text, None) is None) == (text > 0)


def test_repr_of_a_site_is_one_line():
    site = Site(Grid(4, 8, 8, after=3), 64, layer=2, layers=30, step=4, steps=50, branch="cond")
    assert repr(site) == "Site(4x8x8 + 3 text, blocks of 64, layer 2 of 30, step 4 of 50, branch cond)"
    assert repr(Site(Grid(4, 8, 8))) == "Site(4x8x8, blocks of 128, layer 0 of 1, step 0)"


# --- blocks


@given(grids(), st.integers(1, 40), st.sampled_from(list(ORDERS.values())))
def test_blocks_are_the_boxes_of_their_tokens(grid, block, make_order):
    tokens_in_order = make_order(grid)
    blocks = Blocks.from_grid(grid, block, tokens_in_order)
    *axes, text = grid.coordinates()
    members = tokens_in_order.split(block)
    assert blocks.text.tolist() == [bool(text[tokens].any()) for tokens in members]
    for span, axis in zip((blocks.frame, blocks.row, blocks.column), axes, strict=True):
        assert span.low.tolist() == [int(axis[tokens].min()) for tokens in members]
        assert span.high.tolist() == [int(axis[tokens].max()) for tokens in members]


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), min_size=1, max_size=6))
def test_gap_is_the_smallest_distance(spans):
    span = Span(torch.tensor([low for low, _ in spans]), torch.tensor([low + more for low, more in spans]))
    intervals = [range(low, low + more + 1) for low, more in spans]
    assert span.gap().tolist() == [[min(abs(a - b) for a in x for b in y) for y in intervals] for x in intervals]


# --- orders


@pytest.mark.parametrize("make_order", ORDERS.values(), ids=ORDERS)
@given(grid=grids())
def test_orders_permute_the_video_alone(make_order, grid):
    permutation = make_order(grid)
    assert permutation.sort().values.equal(torch.arange(grid.tokens))
    text = grid.coordinates()[3]
    assert permutation[text].equal(torch.arange(grid.tokens)[text])


@given(grids())
def test_frame_last_sorts_by_place(grid):
    frame, row, column, text = grid.coordinates(order.frame_last(grid))
    video = list(zip(*(axis[~text].tolist() for axis in (row, column, frame)), strict=True))
    assert video == sorted(video)


@given(grids(), st.tuples(*[st.integers(1, 4)] * 3))
def test_tiles_are_contiguous_boxes(grid, sides):
    *axes, text = grid.coordinates(order.tiles(grid, *sides))
    tiles = torch.stack([axis // side for axis, side in zip(axes, sides, strict=True)], 1)[~text].tolist()
    assert tiles == sorted(tiles)


@given(grids(13))
def test_nested_boxes_are_contiguous_and_whole_ones_come_first(grid):
    """Blocks of 64, 32 and 16 tokens are boxes, wherever the sides of the video are no multiples of 4."""
    *axes, text = grid.coordinates(order.nested_boxes(grid))
    cells = torch.stack(axes, 1)[~text]
    for box in ((4, 4, 4), (2, 4, 4), (2, 2, 4)):
        number = (cells // torch.tensor(box)).tolist()
        runs = [tuple(first) for first, second in zip(number, [None, *number], strict=False) if first != second]
        assert len(runs) == len(set(runs)), "the tokens of a box are contiguous"
    whole = grid.frames // 4 * (grid.height // 4) * (grid.width // 4) * 64
    for block, box in ((64, (4, 4, 4)), (32, (2, 4, 4)), (16, (2, 2, 4))):
        for part in cells[:whole].split(block) if whole else ():
            assert (part.amax(0) - part.amin(0) + 1).tolist() == list(box)


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16])
def test_hilbert_moves_one_step_at_a_time(side):
    path = torch.stack(Grid(side, side, side).coordinates(order.hilbert(Grid(side, side, side)))[:3])
    assert (path.diff().abs().sum(0) == 1).all()


@pytest.mark.parametrize("frames", range(1, 8))
def test_gilbert_fills_any_box_without_jumps(frames):
    for height, width in product(range(1, 8), repeat=2):
        grid = Grid(frames, height, width)
        steps = torch.stack(grid.coordinates(order.gilbert(grid))[:3]).diff(dim=1).abs()
        assert (steps <= 1).all() and steps.any(0).all()
        if frames % 2 == height % 2 == width % 2 == 0:
            assert (steps.sum(0) == 1).all()


def test_hilbert_blocks_are_smaller_than_row_major_ones():
    grid = Grid(9, 11, 13, after=7)
    extent = lambda blocks: sum((s.high - s.low + 1).double().mean() for s in (blocks.frame, blocks.row, blocks.column))
    assert extent(Blocks.from_grid(grid, 64, order.hilbert(grid))) < 0.75 * extent(Blocks.from_grid(grid, 64))
