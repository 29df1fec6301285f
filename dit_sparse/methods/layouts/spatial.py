"""Spatial sparse attention (SSA): tiles of queries attend to whole cells of voxels, ranked by means of smaller cells.

Source: S. Wu, Y. Lin et al., "Direct3D-S2: Gigascale 3D Generation Made Easy with Spatial Sparse Attention",
arXiv:2505.17412, "Spatial Sparse Attention". Voxels are grouped by cells of space, each with any number of voxels. The
softmax over the means of small cells is summed over the cells that contain them, and the best of these are computed
exactly. With the means m_c of the n_c keys of the cells c with side ``part``, and the means u of the runs of 8 queries
of tile i,

    P_uc = n_c exp(u . m_c / sqrt(D)) / sum_c' n_c' exp(u . m_c' / sqrt(D))
    s_ij = log mean_u sum_{c in j} P_uc

is the score of cell j, whose side is ``cell``. Each tile keeps its best cells. A cell that it does not keep takes part
in the softmax as one pooled term (`dit_sparse.kernels.tail`).

Planning: N^2 D / 64 multiply-adds (means of 8 queries and of 8 keys).

Differs from the authors:
- Nothing is trained: no learned pooling or position encoding, and one softmax over kept cells and pooled terms instead
  of a gated sum of three branches (pooled cells, chosen cells, windows).
- Cells are chosen for tiles of queries along the Morton curve, not for single queries, so that executors compute full
  tiles. Cells have side 4, theirs 8: on a prototype with surfaces of 940 voxels, at density 0.25, the PSNR is 22.5 dB
  with side 4 and 19.0 dB with side 8; pooled terms add 2.5 dB.
- Cells with more than 16 voxels are cut into groups of at most 16, so that a density is met in full volumes, too.
- Each tile keeps the same number of keys, to the nearest group; theirs the same number of cells.
- A video or a dense volume has cells of frames, rows and columns. Text is always kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...clusters import ClusterPlan, Clusters
from ...density import keep_pairs, text_density
from ...grid import BaseGrid, Site
from ...method import Method
from ...notation.settings import POWER_OF_TWO, within
from ...order import morton
from ...scoring import pool, score_in_chunks

QUERIES = 8  # of a mean


@dataclass(frozen=True, kw_only=True)
class Spatial(Method):
    """Cells of voxels, ranked by pooled scores.

    Attributes:
        density: 0.25 if None.
        cell: side of the cells that a tile keeps or drops.
        part: side of the smaller cells whose means are scored; at most ``cell``.
        group: greatest number of keys that are kept or dropped together.
        tail: greatest number of tokens of a pooled term; None: keys that a tile does not keep take no part.
    """

    makes_cluster_plans: ClassVar[bool] = True

    cell: int = within(POWER_OF_TWO, 4)
    part: int = within(POWER_OF_TWO, 2)
    group: int = within("[1, 4096]", 16)
    tail: int | None = within("[1, 4096]", 16)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.part > self.cell:
            raise ValueError(f"part must be at most the side of a cell, {self.cell}, got {self.part}")

    def least_density(self, grid: BaseGrid, block: int) -> float:
        return text_density(grid)

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> ClusterPlan:
        grid, block = site.grid, site.block
        cells = _Cells.from_grid(grid, self.cell, self.part, self.group, block, q.device)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = cells.score(*(x.index_select(2, cells.tokens) for x in (q, k)), block)
        density = 0.25 if self.density is None else self.density
        pairs = (density - text_density(grid)) * grid.tokens**2
        sizes = (x.sizes[..., :n] for x, n in zip((cells.queries, cells.keys), scores.shape[2:], strict=True))
        best = F.one_hot(scores.argmax(-1), scores.shape[-1]).bool()
        text = int(grid.tokens > grid.video)
        keep = F.pad(keep_pairs(scores, pairs, *sizes, best), (0, text, 0, text), value=True)
        return ClusterPlan.from_mask(keep, cells.queries, cells.keys).with_tail(self.tail)


@dataclass(frozen=True)
class _Cells:
    """Tiles of queries and groups of keys of a grid, on a device.

    Attributes:
        tokens: video tokens along the Morton curve, ``[V]``.
        part: number of the part of each of them, ``[V]``.
        sizes: tokens of each part, float32 ``[P]``.
        group: number of the key group that holds each part, ``[P]``.
        groups: number of key groups.
        queries, keys: the tiles and groups as clusters, followed by one of all text.
    """

    tokens: Tensor
    part: Tensor
    sizes: Tensor
    group: Tensor
    groups: int
    queries: Clusters
    keys: Clusters

    @classmethod
    @lru_cache(maxsize=16)
    def from_grid(cls, grid: BaseGrid, cell: int, part: int, most: int, block: int, device: torch.device) -> _Cells:
        tokens, position = morton(grid)[grid.before : grid.before + grid.video], torch.arange(grid.video)
        coordinates = torch.stack(grid.coordinates(tokens)[:3], 1)
        _, cell_number, cell_sizes = _runs(coordinates // cell)
        in_cell = position - (cell_sizes.cumsum(0) - cell_sizes)[cell_number]
        _, group, group_sizes = _runs(torch.stack([cell_number, in_cell // most], 1))
        parts, part_number, part_sizes = _runs(torch.cat([group[:, None], coordinates // part], 1))
        rank, counts = (tokens - grid.before).argsort(), (-(-grid.video // block), len(group_sizes))
        labels = zip(((position // block)[rank], group[rank]), counts, strict=True)
        clusters = (Clusters.from_video_labels(label[None, None], count, grid) for label, count in labels)
        tensors = (x.to(device) for x in (tokens, part_number, part_sizes.float(), parts[:, 0]))
        return cls(*tensors, len(group_sizes), *(one.to(device) for one in clusters))

    def score(self, q: Tensor, k: Tensor, block: int) -> Tensor:
        """Return the log of the attention of each tile to each key group, float32 ``[B, H, tiles, groups]``, for the
        video tokens along the curve."""
        run = math.gcd(QUERIES, block)
        tiles, rows = -(-q.shape[2] // block), block // run
        means = k.new_zeros(*k.shape[:2], len(self.sizes), k.shape[3], dtype=torch.float32)
        means = means.index_add_(2, self.part, k.float()) / self.sizes[:, None]
        means = torch.cat([means, self.sizes.log()[:, None].expand(*k.shape[:2], -1, 1)], 3)
        queries = F.pad(pool(q, run) * q.shape[-1] ** -0.5, (0, 1), value=1.0)  # the products add the log sizes
        missing = tiles * rows - queries.shape[2]
        valid = (torch.arange(tiles * rows, device=q.device) < queries.shape[2]).float().view(tiles, 1, rows)
        queries = F.pad(queries, (0, 0, 0, missing)).unflatten(2, (tiles, rows))

        def score_rows(tile: slice) -> Tensor:
            weights = (queries[:, :, tile].flatten(2, 3) @ means.mT).softmax(-1).unflatten(2, (-1, rows))
            weights = (valid[tile] @ weights)[..., 0, :]
            return weights.new_zeros(*weights.shape[:-1], self.groups).index_add_(-1, self.group, weights)

        return score_in_chunks(score_rows, tiles, q.shape[0] * q.shape[1] * rows * len(self.sizes)).log()


def _runs(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows of the runs of equal ``rows [N, n]``, the number of the run of each row, and their sizes."""
    return rows.unique_consecutive(return_inverse=True, return_counts=True, dim=0)
