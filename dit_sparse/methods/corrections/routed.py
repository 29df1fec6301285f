"""Routed attention: exact tiles where a pooled term would be wrong, pooled terms everywhere else.

A method of this project, described and measured in docs/routed.md. Its pooled terms are those of H. Ren et al.,
"Combiner: Full Attention Transformer with Sparse Computation Cost", arXiv:2107.05768.

- Order. Tokens are sorted by nested boxes, 4x4x4, 2x4x4 and 2x2x4: blocks of 64 queries and tiles of 16 keys are
  compact. A pooled term is accurate only if its keys are similar.
- Tail. Every tile j that a row does not compute takes part in its softmax as one term, with the mean key m_j and the
  mean value of its n_j keys; its logit is q . m_j / sqrt(D) + log n_j.
- Routing. The tiles to compute are those with the largest error of the pooled term, not those with the most attention.
  With the variance s_j of each channel of the keys of a tile, and the softmax w over the pooled terms, tiles are ranked
  by

      a_ij = mean over the queries q of block i  of  w_qj (q^2 . s_j) / D
      b_ij = mean over some queries r of block i  of  | p_rn - exp(r . m_j / sqrt(D) - L_r) |_2  over the keys n of j

  and their product, where p is the exact attention of every eighth query and L its log-sum-exp.
- Ramp. The density falls over the sparse steps, from 1.3 to 0.6 times its mean (`Schedule.density_ramp`).
- Residual. R is the error of the plan in the last dense step, averaged over the branches of guidance, because guidance
  amplifies differences between them. Until the second plan the output is O + alpha^age R.

Planning: N^2 D / 4 multiply-adds (all queries with means of 16 keys, every 8th query with all keys).

Differs from the authors: pooled terms replace only tiles that are not computed, and nothing is trained. The rows and
columns of text are computed exactly, and a row always keeps its best tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...clusters import ClusterPlan, Clusters
from ...density import keep_pairs, text_density
from ...grid import Grid, Site
from ...kernels.free_memory import has_memory
from ...kernels.planning.pooling_error import mass_and_spread, pooling_error
from ...method import AttentionOutput, Method, shared_memory
from ...notation.settings import within
from ...order import nested_boxes


@dataclass(frozen=True, kw_only=True)
class Routed(Method):
    """Exact tiles routed by the error of their pooled terms.

    The residual takes ``H * N * D * bytes`` bytes for every layer and prompt from the last dense step to the second
    plan. If this memory is not free at the last dense step, the residual is left out with a warning.

    Attributes:
        density: by default 0.25.
        boxes: whether tokens are sorted by nested boxes; otherwise they stay in row-major order.
        key_tile: tokens of a key tile; queries are tiled by the block of the run.
        tail: greatest number of tokens of a pooled term; None: tiles that are not computed take no part.
        spread: whether a is the mass times the variance of the logits; otherwise the mass alone.
        every: b uses every n-th query; None: tiles are ranked by a alone.
        density_ramp: factors of the density at the first and the last sparse step; None: the same density.
        residual: alpha for eight steps; n steps use alpha^(8 / n). None: no residual.
    """

    makes_cluster_plans: ClassVar[bool] = True

    boxes: bool = True
    key_tile: int = within("[1, 4096]", 16)
    tail: int | None = within("[1, 4096]", 16)
    spread: bool = True
    every: int | None = within("[1, 4096]", 8)
    density_ramp: tuple[float, float] | None = within("(0, 1000]", (1.3, 0.6))
    residual: float | None = within("(0, 1]", 0.7)

    @property
    def observes_dense(self) -> bool:
        return self.residual is not None

    def least_density(self, grid: Grid, block: int) -> float:
        return text_density(grid)

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> ClusterPlan:
        if memory.pop("residual_applied", False):
            memory.pop("residual")
        grid, block = site.grid, site.block
        queries, keys = _tiles(grid, self.boxes, block, self.key_tile, q.device)
        video = keys.order[0, 0, : grid.video]
        q, k = (x.index_select(2, video) for x in (q, k))
        scores = self.score(q, k, block)
        density = 0.25 if self.density is None else self.density
        pairs = (density - text_density(grid)) * grid.tokens**2
        sizes = (x.sizes[..., :n] for x, n in zip((queries, keys), scores.shape[2:], strict=True))
        best = F.one_hot(scores.argmax(-1), scores.shape[-1]).bool()
        ragged = grid.video % block > 0 or grid.video % self.key_tile > 0
        keep = keep_pairs(scores, pairs, *sizes, best, equal=True, ragged=ragged)
        text = int(grid.tokens > grid.video)
        keep = F.pad(keep, (0, text, 0, text), value=True)
        return ClusterPlan.from_mask(keep, queries, keys).with_tail(self.tail)

    def score(self, q: Tensor, k: Tensor, block: int) -> Tensor:
        """Return the error of the pooled term of each tile, ``[B, H, Q, K]``, for video tokens in order."""
        score = mass_and_spread(q, k, block, self.key_tile, self.spread)
        if self.every is not None:
            error = pooling_error(q, k, block, self.key_tile, self.every)
            score = score.clamp(min=1e-18) * error.clamp(min=1e-18)
        return score

    def observe_dense(self, result: AttentionOutput, site: Site, memory: dict) -> None:
        shared, batch = shared_memory(memory), len(result.q) // (1 + site.both_branches)
        if "has room" not in shared:
            need = site.layers * batch * result.out[0].numel() * result.out.element_size()
            shared["has room"] = has_memory(f"the residual of {site.layers} layers", need, result.q.device)
        if not shared["has room"]:
            return
        lost = result.dense()[0] - result.out
        if site.both_branches and len(lost) % 2 == 0:
            lost = lost.unflatten(0, (2, -1)).mean(0)
        step, count, mean = memory.get("residual", (site.step, 0, 0.0))
        memory["residual"] = (step, count + 1, mean + (lost - mean) / (count + 1))

    def correct(self, result: AttentionOutput, site: Site, memory: dict) -> tuple[Tensor, Tensor | None]:
        if "residual" not in memory:
            return result.out, result.lse
        step, _, residual = memory["residual"]
        memory["residual_applied"] = True
        alpha = self.residual ** ((site.step - step) * 8 / (site.steps or 8))
        return result.out + alpha * residual.repeat(len(result.out) // len(residual), 1, 1, 1), result.lse


@lru_cache(maxsize=16)
def _tiles(grid: Grid, boxes: bool, block: int, key_tile: int, device: torch.device) -> tuple[Clusters, Clusters]:
    """Return the tiles of queries and of keys, cached on a device: those of the video tokens in order, and one of all
    text, so that padding stays at the end."""
    order, text = nested_boxes(grid) if boxes else torch.arange(grid.tokens), grid.coordinates()[3]
    order = torch.cat([order[~text], order[text]])[None, None].to(device)
    ends = [grid.video, grid.tokens] if text.any() else [grid.video]
    edges = lambda size: torch.tensor([[[*range(0, grid.video, size), *ends]]], dtype=torch.int32, device=device)
    return Clusters(order, edges(block)), Clusters(order, edges(key_tile))
