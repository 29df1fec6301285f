"""Voxel grids: values by content, wrong input, packed items, and the order of their tokens."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse import Grid, Site, VoxelGrid, order
from dit_sparse.density import VideoBlocks
from dit_sparse.grid import Blocks
from voxel_sets import packed, surface

cells = st.sets(st.tuples(*[st.integers(-9, 9)] * 3), min_size=1, max_size=60)
texts = st.integers(0, 5)


def coordinates(grid) -> torch.Tensor:
    return torch.stack(grid.coordinates()[:3], 1)[~grid.coordinates()[3]]


@given(cells, texts, texts)
def test_tokens_are_text_voxels_text(cells, before, after):
    voxels = torch.tensor(list(cells))
    grid = VoxelGrid(voxels, before=before, after=after)
    assert (grid.video, grid.tokens) == (len(voxels), before + len(voxels) + after)
    assert coordinates(grid).equal(voxels - voxels.amin(0))
    assert grid.sides == tuple((coordinates(grid).amax(0) + 1).tolist())
    assert grid.coordinates()[3].tolist() == [True] * before + [False] * len(voxels) + [True] * after


def test_grids_are_equal_by_content():
    voxels = surface(300)
    grid = VoxelGrid(voxels, before=1)
    same = [VoxelGrid(voxels.clone().int(), 1), VoxelGrid(voxels.double(), 1), VoxelGrid(voxels.tolist(), 1)]
    same += [pickle.loads(pickle.dumps(grid)), copy.deepcopy(grid), replace(VoxelGrid(voxels), before=1)]
    assert all(one == grid and hash(one) == hash(grid) for one in same)
    other = [VoxelGrid(voxels), VoxelGrid(voxels, after=1), VoxelGrid(voxels + 1, 1), VoxelGrid(voxels.flip(0), 1)]
    other += [VoxelGrid(torch.nn.functional.pad(voxels, (1, 0))), Grid(1, 1, 300, before=1)]
    assert all(one != grid for one in other)


def test_grids_do_not_change_with_the_tensor_of_the_caller():
    voxels = surface(30)
    grid, expected = VoxelGrid(voxels), VoxelGrid(voxels.clone())
    voxels += torch.arange(30)[:, None]
    assert coordinates(grid).equal(coordinates(expected)) and grid.items()[0][1] == expected.items()[0][1]


@pytest.mark.parametrize(
    "voxels, words",
    [
        (torch.zeros(2, 3, dtype=torch.long), "the same voxel occurs twice"),
        (torch.tensor([[1, 4, 5, 6], [0, 4, 5, 6], [1, 4, 5, 6]]), "the same voxel occurs twice"),
        (torch.zeros(0, 3), r"\[V, 4\] with the batch item, got \[0, 3\]"),
        (torch.zeros(4, 2), r"got \[4, 2\]"),
        (torch.zeros(1, 5, 3), r"got \[1, 5, 3\]"),
        (torch.tensor([[0.5, 1, 2]]), "whole numbers"),
        (torch.tensor([[float("nan"), 1, 2]]), "whole numbers"),
        (torch.zeros(1, 3, dtype=torch.bool), "whole numbers"),
        (torch.tensor([[0, 0, 0], [2**20, 0, 0]]), "at most 1048576 along an axis, got 1048577"),
        ("voxels", "must be a tensor of coordinates"),
        (None, "must be a tensor of coordinates"),
    ],
)
def test_wrong_coordinates_are_refused_in_a_sentence(voxels, words):
    with pytest.raises(ValueError, match=words) as error:
        VoxelGrid(voxels)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize("length", [-1, 1.5, True, None, "2"])
def test_wrong_text_lengths_are_refused(length):
    for name in ("before", "after"):
        with pytest.raises(ValueError, match=f"{name} must be a number of text tokens"):
            VoxelGrid(surface(3), **{name: length})


# --- items and orders


@given(cells, texts, texts)
def test_an_item_is_sorted_along_the_morton_curve(cells, before, after):
    """The voxels of an aligned cell of any power of two are consecutive, whatever the order of the input."""
    grid = VoxelGrid(torch.tensor(list(cells)), before, after)
    ((tokens, item),) = grid.items()
    tokens = torch.arange(grid.tokens) if tokens is None else tokens
    assert tokens.sort().values.equal(torch.arange(grid.tokens))
    assert item.coordinates()[3].equal(grid.coordinates()[3][tokens])
    assert coordinates(item).equal(coordinates(grid)[tokens[before : before + grid.video] - before])
    assert (item.before, item.after) == (before, after)
    for side in (2, 4, 8):
        numbers = (coordinates(item) // side).tolist()
        runs = [tuple(one) for one, last in zip(numbers, [None, *numbers], strict=False) if one != last]
        assert len(runs) == len(set(runs))
    assert item.items() == [(None, item)]
    assert order.morton(item).equal(torch.arange(grid.tokens))


def test_items_do_not_depend_on_the_order_of_the_input():
    """Equal sets of voxels share plans, also if a model shuffles them."""
    voxels = surface(200)
    shuffled = voxels[torch.randperm(200, generator=torch.Generator().manual_seed(1))]
    assert VoxelGrid(voxels, 1).items()[0][1] == VoxelGrid(shuffled, 1).items()[0][1]


def test_a_packed_sequence_has_an_item_for_each_batch_item():
    voxels, sizes = packed(7, 60, 1), [7, 60, 1]
    voxels[:, 1:] += 3 * voxels[:, :1]
    shuffled = voxels[torch.randperm(len(voxels), generator=torch.Generator().manual_seed(1))]
    for coordinates_in_order in (voxels, shuffled):
        grid = VoxelGrid(coordinates_in_order)
        assert "68 voxels of 3 items" in str(grid) and grid.tokens == 68
        for number, (tokens, item) in enumerate(grid.items()):
            own = coordinates_in_order[tokens]
            assert (own[:, 0] == number).all() and item.video == sizes[number]
            assert coordinates(item).equal(own[:, 1:] - own[:, 1:].amin(0))
            assert item == VoxelGrid(voxels[voxels[:, 0] == number, 1:]).items()[0][1]
    with pytest.raises(ValueError, match="planned item by item"):
        grid.coordinates()
    with pytest.raises(ValueError, match="has no text"):
        VoxelGrid(voxels, before=1)


def test_one_batch_item_is_no_packed_sequence():
    voxels = torch.nn.functional.pad(surface(20), (1, 0), value=3)
    grid = VoxelGrid(voxels, before=2)
    assert grid.item is None and len(grid.items()) == 1
    assert coordinates(grid).equal(coordinates(VoxelGrid(surface(20))))


ORDERS = {"morton": order.morton, "hilbert": order.hilbert, "gilbert": order.gilbert, "boxes": order.nested_boxes}


@pytest.mark.parametrize("make_order", ORDERS.values(), ids=ORDERS)
@given(cells, texts, texts)
def test_orders_and_blocks_fit_voxels(make_order, cells, before, after):
    grid = VoxelGrid(torch.tensor(list(cells)), before, after)
    permutation, text = make_order(grid), grid.coordinates()[3]
    assert permutation.sort().values.equal(torch.arange(grid.tokens))
    assert permutation[text].equal(torch.arange(grid.tokens)[text])
    blocks = Blocks.from_grid(grid, 16, permutation)
    for span, axis in zip((blocks.frame, blocks.row, blocks.column), grid.coordinates(), strict=False):
        assert span.low.tolist() == [int(axis[part].min()) for part in permutation.split(16)]
        assert span.high.tolist() == [int(axis[part].max()) for part in permutation.split(16)]
    assert VideoBlocks.from_grid(grid, 16).total == grid.tokens


def test_a_hilbert_block_of_a_full_cube_is_a_cube():
    grid = VoxelGrid(torch.cartesian_prod(*[torch.arange(-4, 4)] * 3).flip(0))
    for make_order in (order.hilbert, order.morton):
        blocks = Blocks.from_grid(grid, 64, make_order(grid))
        assert all((span.high - span.low == 3).all() for span in (blocks.frame, blocks.row, blocks.column))


def test_reprs_are_short():
    grid = VoxelGrid(surface(50), before=1)
    assert repr(grid) == "VoxelGrid(1 text + 50 voxels in 5x5x5)"
    assert repr(Site(grid, 16)) == "Site(1 text + 50 voxels in 5x5x5, blocks of 16, layer 0 of 1, step 0)"
