"""`spatial` against loops over voxels, means and cells in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attention_cases import plan_of, qkv
from dit_sparse import Grid, VoxelGrid, order
from dit_sparse.methods.layouts.spatial import Spatial
from voxel_sets import surface

GRIDS = [VoxelGrid(surface(150), before=2).items()[0][1], VoxelGrid(surface(131)), Grid(5, 7, 6, after=27)]
BLOCK = 16
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: str(grid).replace(" ", ""))


def groups_of(grid, side: int, most: int = 16) -> dict[tuple, list[int]]:
    """Return the tokens of every cell, cut into runs of at most ``most`` along the Morton curve."""
    axes, groups = grid.coordinates()[:3], {}
    for token in order.morton(grid)[grid.before : grid.before + grid.video].tolist():
        cell, run = tuple(int(axis[token]) // side for axis in axes), 0
        while len(groups.get((*cell, run), ())) == most:
            run += 1
        groups.setdefault((*cell, run), []).append(token)
    return groups


def tiles_of(grid) -> list[list[int]]:
    """Return the tokens of every tile of queries: runs along the Morton curve."""
    video = order.morton(grid)[grid.before : grid.before + grid.video].tolist()
    return [video[first : first + BLOCK] for first in range(0, len(video), BLOCK)]


def scores_of(grid, q: Tensor, k: Tensor, tile: list[int], groups: dict, part: int) -> dict[tuple, float]:
    """Return the attention of the means of 8 queries to each group, by the means of its parts."""
    axes, parts = grid.coordinates()[:3], {}
    for name, tokens in groups.items():
        for token in tokens:
            parts.setdefault((name, *(int(axis[token]) // part for axis in axes)), []).append(token)
    mass = dict.fromkeys(groups, 0.0)
    for first in range(0, len(tile), 8):
        query = q[tile[first : first + 8]].mean(0)
        logits = {
            name: float(query @ k[own].mean(0)) / math.sqrt(q.shape[1]) + math.log(len(own))
            for name, own in parts.items()
        }
        total = sum(math.exp(logit) for logit in logits.values())
        for (name, *_), logit in logits.items():
            mass[name] += math.exp(logit) / total
    return mass


@every_grid
@pytest.mark.parametrize("cell, part", [(4, 2), (2, 2), (4, 1)])
def test_spatial_keeps_the_best_cells(grid, cell, part):
    q, k, _ = qkv(grid.tokens, heads=2, dim=16, seed=4)
    plan = plan_of(Spatial(density=0.5, cell=cell, part=part), grid, BLOCK, q, k)
    groups, mask = groups_of(grid, cell), plan.token_mask(torch.arange(grid.tokens))[0]
    assert plan.tail == 16 and not mask.all()
    for head in range(2):
        for tile in tiles_of(grid):
            rows = mask[head, tile]
            assert (rows == rows[0]).all(), "the queries of a tile attend to the same keys"
            kept = {name: rows[0, own] for name, own in groups.items()}
            assert all(one.all() or not one.any() for one in kept.values()), "a group is kept or dropped as a whole"
            scores = scores_of(grid, q[0, head].double(), k[0, head].double(), tile, groups, part)
            best = [score for name, score in scores.items() if kept[name].all()]
            rest = [score for name, score in scores.items() if not kept[name].any()]
            assert best and min(best) >= max(rest, default=0.0) * (1 - 1e-4)


@every_grid
def test_rows_keep_the_same_number_of_keys(grid):
    """To the nearest group. With few rows, which rank the groups in the same order, the density is met roughly."""
    plan, video = plan_of(Spatial(density=0.6), grid, BLOCK), ~grid.coordinates()[3]
    mean = (0.6 - 1 + (grid.video / grid.tokens) ** 2) * grid.tokens**2 / grid.video
    kept = plan.token_mask(video.nonzero().flatten())[0][..., video].sum(-1)
    assert ((kept - mean).abs() <= 16).all() and abs(plan.density - 0.6) <= 0.02


def test_part_is_at_most_the_cell():
    with pytest.raises(ValueError, match="part must be at most the side of a cell, 2, got 4"):
        Spatial(cell=2, part=4)
