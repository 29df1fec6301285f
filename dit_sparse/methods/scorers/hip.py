"""HiP: a tree search for the best key blocks, in which each cell of blocks is represented by its mean key.

Source: H. Lee et al., "A Training-free Sub-quadratic Cost Transformer Model Serving Framework With Hierarchically
Pruned Attention" (HiP), arXiv:2406.09827, sec. 3. The keys are divided into as many cells as a block of queries may
keep. Every cell is split in two, a representative key of each half is scored by its largest product with the queries
of the block, and the better half of the cells is kept, until a cell is a block. A row costs k log(N / k) keys instead
of N.

Planning: N^2 D r log2(1 / r) / 128 multiply-adds at density r (every 4th query).

Differs from the authors:
- Tokens are ordered along a Hilbert curve, on which the cells of the tree are compact boxes of the video: an octree.
- A cell is represented by the mean of its keys, not by one of them, because cells end at blocks of 64 or 128 keys,
  theirs at 2 keys. ``queries_per_block`` queries of a block score, theirs all.
- The own block is kept, and text is kept and not part of the tree, in place of their sink of 256 and window of 512
  tokens.
- The density determines k. Without one a row keeps 512 keys, as theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import order
from ...budget import Budget, Top
from ...density import VideoBlocks
from ...grid import Grid, Site
from ...method import Scorer
from ...notation.settings import within
from ...scoring import sample_queries, score_in_chunks, split_blocks


@dataclass(frozen=True, kw_only=True)
class HiP(Scorer):
    """Tree search over key blocks. Scores are ranks: blocks of cells that were pruned earlier rank lower.

    Attributes:
        keys: k, keys that a row keeps without a density.
        queries_per_block: queries of each block that score cells.
    """

    keys: int = within("[1, 1000000]", 512)
    queries_per_block: int = within("[1, 256]", 16)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and not isinstance(self.budget, Top):
            raise ValueError(f"budget of hip must be top(...), because its scores are ranks, got {self.budget}")

    def order(self, grid: Grid, block: int) -> Tensor:
        return order.hilbert(grid)

    def paper_budget(self, blocks: VideoBlocks) -> Budget:
        return Top(min(1.0, self.keys / max(1, blocks.tokens)))

    def score(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Tensor:
        blocks, block = self.blocks(site, q.device), site.block
        first, count = -(-site.grid.before // block), len(blocks.sizes)
        queries = sample_queries(q, block, self.queries_per_block)
        ends = (first, queries.shape[2] - first - count)
        if count == 0:
            return q.new_zeros(*q.shape[:2], sum(ends), sum(ends))
        queries, width = queries[:, :, first : first + count], self._row_blocks(blocks)
        levels = tree_levels(split_blocks(k, block)[:, :, first : first + count].sum(3), blocks.sizes, width)
        search = lambda rows: search_tree(queries[:, :, rows], levels, width)
        scores = score_in_chunks(search, count, q.shape[0] * q.shape[1] * 2 * width * q.shape[-1])
        return F.pad(scores, ends * 2)

    def _row_blocks(self, blocks: VideoBlocks) -> int:
        """Return k in blocks, at most all blocks."""
        if self.density is None:
            share = (self.budget or self.paper_budget(blocks)).density
        else:
            share = max(0.0, blocks.pairs(self.density)) / blocks.tokens**2
        return min(len(blocks.sizes), ceil(share * len(blocks.sizes)) + 1)  # rows alternate between two numbers


@dataclass(frozen=True)
class Level:
    """The C cells of one level of the tree.

    Attributes:
        means: mean keys, ``[B, H, C, D]``.
        empty: cells without a block, bool ``[C]``.
        cell: cell of each block, int64 ``[V]``.
    """

    means: Tensor
    empty: Tensor
    cell: Tensor


def tree_levels(sums: Tensor, sizes: Tensor, width: int) -> list[Level]:
    """Return the levels of the tree over blocks with the sums of keys ``[B, H, V, D]`` and sizes ``[V]``: from twice
    ``width`` cells to one block per cell."""
    count, device = sums.shape[2], sums.device
    depth = ceil(log2(count / width))
    sums, sizes = F.pad(sums.double().cumsum(2), (0, 0, 1, 0)), F.pad(sizes.double().cumsum(0), (1, 0))
    levels = []
    for level in range(min(1, depth), depth + 1):
        cells = width << level
        edges = torch.arange(cells + 1) * count // cells  # those of the level above are every second one
        cell = (torch.searchsorted(edges, torch.arange(count), right=True) - 1).to(device)
        edges = edges.to(device)
        size = sizes[edges].diff()[:, None]
        means = sums[:, :, edges].diff(dim=2) / size.clamp(min=1)
        levels.append(Level(means.float(), size[:, 0] == 0, cell))
    return levels


def search_tree(queries: Tensor, levels: list[Level], width: int) -> Tensor:
    """Return minus the rank of every block, ``[B, H, Q, V]``, for queries ``[B, H, Q, S, D]``. Blocks of cells that are
    pruned rank below all others, first those pruned at the first level."""
    batch, heads, rows, _, dim = queries.shape
    cells = torch.arange(len(levels[0].empty), device=queries.device).expand(batch, heads, rows, -1)
    scores = queries.new_full((), -torch.inf)
    for number, level in enumerate(levels):
        flat = cells.flatten(2)[..., None].expand(-1, -1, -1, dim)
        candidates = level.means.gather(2, flat).unflatten(2, (rows, -1))
        logits = (queries @ candidates.mT).amax(3).masked_fill(level.empty[cells], -torch.inf)
        cells = cells.gather(-1, logits.argsort(dim=-1, descending=True, stable=True))
        rank = torch.arange(cells.shape[-1], device=cells.device) + (len(levels) - 1 - number) * len(levels[-1].empty)
        by_cell = queries.new_full((batch, heads, rows, len(level.empty)), -torch.inf)
        by_cell = by_cell.scatter_(-1, cells, -rank.to(by_cell.dtype).expand(cells.shape))
        scores = torch.maximum(scores, by_cell[..., level.cell])
        best = cells[..., :width]
        cells = torch.stack([2 * best, 2 * best + 1], -1).flatten(-2)
    return scores
