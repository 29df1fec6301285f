"""Routing Transformer: queries and keys share k-means centroids, and attention is within clusters of equal size.

Source: A. Roy et al., "Efficient Content-Based Sparse Attention with Routing Transformers", arXiv:2003.05997, sec. 4.
Queries and keys of each head are projected to the unit sphere and clustered around common centroids, about sqrt(N) of
them. Each centroid takes the w = N / C nearest queries and the w nearest keys, so that all clusters cost the same, and
a query attends to the keys of its cluster.

Planning: 5 N^1.5 D multiply-adds (k-means of every fourth token, and two similarities of each to its centroids).

Differs from the authors:
- They learn the centroids by a moving average in training. Here they come from spherical k-means of every fourth query
  and key of the call, starting from those of the previous plan.
- A centroid that takes the nearest tokens on its own terms leaves some tokens out and takes others twice. Here every
  token is in exactly one cluster: centroids accept the most similar ones of the tokens that ask for them, and refused
  tokens ask for the nearest centroid with free places.
- The mean of all queries and the mean of all keys are subtracted before the projection: queries and keys of a trained
  model point in different directions, and would have different nearest centroids. On `shapes-wan`, in clusters of
  64 at density 0.25, the relative error of the output is 0.166 with and 0.173 without this.
- With ``density`` a query cluster keeps its own key cluster and, of the others, those with the greatest product of mean
  query and mean key. By the similarity of the centroids the error is 0.230, as with random blocks (0.232).
- All heads route; theirs are half local.
- Text is a cluster that attends to all tokens and that all tokens attend to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...clusters import ClusterPlan, Clusters
from ...density import keep_pairs, text_density
from ...grid import Grid, Site
from ...kernels.planning.cluster import kmeans
from ...kernels.planning.equal_clusters import assign_equally
from ...method import Method
from ...notation.settings import within
from ...order import reorder
from ...plan import num_blocks
from ...scoring import pool

SAMPLE = 4  # k-means takes every fourth token


@dataclass(frozen=True, kw_only=True)
class Routing(Method):
    """Balanced clusters of queries and keys around common centroids.

    Attributes:
        init_iterations, iterations: k-means iterations of the first plan and of later ones.
        rounds: how often tokens without a cluster ask for a place, see `assign_equally`.
    """

    makes_cluster_plans: ClassVar[bool] = True

    init_iterations: int = within("[1, 1000]", 2)
    iterations: int = within("[1, 1000]", 1)
    rounds: int = within("[1, 100]", 6)

    def least_density(self, grid: Grid, block: int) -> float:
        size = cluster_size(grid.video)
        return text_density(grid) + (grid.video // size * size**2 + (grid.video % size) ** 2) / grid.tokens**2

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> ClusterPlan:
        grid, size, scale = site.grid, cluster_size(site.grid.video), q.shape[-1] ** -0.5
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        q, k = (x[:, :, grid.before : grid.before + grid.video] for x in (q, k))
        directions = [F.normalize(x - x.float().mean(2, keepdim=True).to(x.dtype), dim=-1) for x in (q, k)]
        centroids = self._centroids(torch.cat(directions, 2)[:, :, ::SAMPLE], num_blocks(grid.video, size), memory)
        labels = [assign_equally(x, centroids, size, self.rounds) for x in directions]
        queries, keys = (Clusters.from_labels(x, centroids.shape[2]) for x in labels)
        means = [pool(reorder(x, side.order), size) for x, side in ((q, queries), (k, keys))]
        keep = self._choose(means[0] @ means[1].mT * scale, grid, size)
        if grid.tokens > grid.video:
            keep = F.pad(keep, (0, 1, 0, 1), value=True)
            queries, keys = (Clusters.from_video_labels(x, centroids.shape[2], grid) for x in labels)
        return ClusterPlan.from_mask(keep, queries, keys)

    def _centroids(self, directions: Tensor, clusters: int, memory: dict) -> Tensor:
        """Return the centroids of spherical k-means, float32 ``[B, H, C, D]``."""
        centroids = memory.get("centroids")
        for _ in range(self.init_iterations if centroids is None else self.iterations):
            centroids = F.normalize(kmeans(directions, clusters, 1, centroids)[1], dim=-1)
        memory["centroids"] = centroids
        return centroids

    def _choose(self, scores: Tensor, grid: Grid, size: int) -> Tensor:
        """Return the mask of the key clusters that each query cluster attends to."""
        own = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
        if self.density is None:
            return own.expand(scores.shape)
        pairs = (self.density - text_density(grid)) * grid.tokens**2
        sizes = (grid.video - torch.arange(scores.shape[-1], device=scores.device) * size).clamp(max=size)
        return keep_pairs(scores, pairs, sizes, sizes, own, equal=True, ragged=grid.video % size > 0)


def cluster_size(tokens: int) -> int:
    """Return the tokens in each of about sqrt(tokens) clusters."""
    return -(-tokens // round(tokens**0.5))
