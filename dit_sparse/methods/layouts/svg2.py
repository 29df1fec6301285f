"""Sparse VideoGen2 (SVG2): k-means clusters of queries and keys, and top-p selection of key clusters.

Source: S. Yang, H. Xi et al., "Sparse VideoGen2: Accelerate Video Generation with Sparse Attention via Semantic-Aware
Permutation", arXiv:2505.18875, sec. 4. Queries and keys of each head are clustered by k-means. With centroids q_i and
k_j and n_j keys in cluster j,

    P_ij = n_j exp(q_i . k_j / sqrt(D)) / sum_m n_m exp(q_i . k_m / sqrt(D))

estimates the attention between clusters. Each query cluster keeps the fewest key clusters that add up to ``top_p``, and
at least the fraction ``min_ratio`` of them. The first k-means runs ``init_iterations``; later ones start from the
centroids of the previous plan and run ``iterations``. Text is a cluster that attends to all tokens and that all tokens
attend to.

Planning: 9.5 N^1.5 D multiply-adds (two iterations of k-means).

Differs from the authors:
- The number of clusters grows with the square root of the sequence and equals theirs at 720p (Wan: 300 and 1,000
  clusters of 75,600 tokens), so that every grid works.
- K-means starts from evenly spaced tokens, not random ones, and its number of iterations is fixed, because a test of
  convergence synchronizes with the GPU. On `shapes-wan`, 2,048 tokens at density 0.25, 10 initial iterations
  (theirs: 50) are no better than 2 (31.2 dB both), and 1 later iteration is worse than 2 (30.3 dB).
- The branches of guidance share clusters and plan, not only centroids: separate clusters cost 7 dB.
- With ``density`` each query cluster keeps its best key clusters, at least one, up to the same number of tokens, to
  the nearest cluster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ...budget import Mass
from ...clusters import ClusterPlan, Clusters
from ...density import keep_pairs, text_density
from ...grid import Grid, Site
from ...kernels.planning.cluster import kmeans
from ...method import Method
from ...notation.settings import within

REFERENCE_TOKENS = 75_600


@dataclass(frozen=True, kw_only=True)
class SVG2(Method):
    """Semantic-aware permutation.

    Attributes:
        query_clusters, key_clusters: number of clusters of 75,600 tokens.
        top_p: estimated attention mass to keep, without a density.
        min_ratio: least fraction of the key clusters to keep, without a density.
        init_iterations, iterations: k-means iterations of the first plan and of later ones.
    """

    makes_cluster_plans: ClassVar[bool] = True

    query_clusters: int = within("[1, 1000000]", 300)
    key_clusters: int = within("[1, 1000000]", 1000)
    top_p: float = within("(0, 1]", 0.9)
    min_ratio: float = within("[0, 1]", 0.1)
    init_iterations: int = within("[1, 1000]", 2)
    iterations: int = within("[1, 1000]", 2)

    def least_density(self, grid: Grid, block: int) -> float:
        return text_density(grid)

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> ClusterPlan:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        queries, query_centroids = self._cluster(q, self.query_clusters, site.grid, memory, "query centroids")
        keys, key_centroids = self._cluster(k, self.key_clusters, site.grid, memory, "key centroids")
        logits = query_centroids @ key_centroids.mT * q.shape[-1] ** -0.5 + keys.sizes[..., None, :].log()
        if self.density is None:
            keep = Mass(self.top_p, self.min_ratio).keep(logits)
        else:
            best = F.one_hot(logits.argmax(-1), len(keys)).bool()
            pairs = (self.density - text_density(site.grid)) * site.grid.tokens**2
            keep = keep_pairs(logits, pairs, queries.sizes, keys.sizes, best)
        if site.grid.tokens > site.grid.video:
            keep = F.pad(keep, (0, 1, 0, 1), value=True)
            queries, keys = (Clusters.from_video_labels(x.labels, len(x), site.grid) for x in (queries, keys))
        return ClusterPlan.from_mask(keep, queries, keys)

    def _cluster(self, x: Tensor, clusters: int, grid: Grid, memory: dict, name: str) -> tuple[Clusters, Tensor]:
        """Return clusters of the video tokens of ``x [B, H, N, D]``, and their centroids."""
        video = x[:, :, grid.before : grid.before + grid.video]
        count = min(grid.video, round(clusters * (grid.video / REFERENCE_TOKENS) ** 0.5) or 1)
        iterations = self.iterations if name in memory else self.init_iterations
        video_clusters, memory[name] = kmeans(video, count, iterations, memory.get(name))
        return video_clusters, memory[name]
