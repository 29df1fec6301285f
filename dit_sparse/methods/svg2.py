"""Sparse VideoGen2 (SVG2): k-means clusters of queries and keys, and top-p selection of key clusters.

Source: S. Yang, H. Xi et al., "Sparse VideoGen2: Accelerate Video Generation with Sparse Attention via Semantic-Aware
Permutation", arXiv:2505.18875, sec. 4. Queries and keys of each head are clustered by k-means. With centroids q_i and
k_j and n_j keys in cluster j,

    P_ij = n_j exp(q_i . k_j / sqrt(D)) / sum_m n_m exp(q_i . k_m / sqrt(D))

estimates the attention between clusters. Each query cluster keeps the fewest key clusters that add up to ``top_p``, and
at least the fraction ``min_ratio`` of them. The first k-means runs ``init_iterations``; later ones start from the
centroids of the previous plan and run ``iterations``. Text is a cluster that attends to all and is attended by all.

Differs from the authors:
- The number of clusters grows with the square root of the sequence and equals theirs at 720p (Wan: 300 and 1,000
  clusters of 75,600 tokens), so that every grid works.
- K-means starts from evenly spaced tokens, not random ones, and its number of iterations is fixed, because a test of
  convergence synchronizes with the GPU. On the bundled model, 2,048 tokens at density 0.25, 10 initial iterations
  (theirs: 50) are no better than 2 (31.2 dB both), and 1 later iteration is worse than 2 (30.3 dB).
- The branches of guidance share clusters and plan, not only centroids: separate clusters cost 7 dB.
- With ``density`` each query cluster keeps its best key clusters up to that fraction of the tokens, to the nearest
  cluster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import Mass, top_tokens
from ..clusters import ClusterPlan, Clusters
from ..grid import Grid, Site
from ..kernels.planning.cluster import kmeans
from ..method import Method

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

    query_clusters: int = 300
    key_clusters: int = 1000
    top_p: float = 0.9
    min_ratio: float = 0.1
    init_iterations: int = 2
    iterations: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("query_clusters", "key_clusters", "init_iterations", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        Mass(self.top_p, self.min_ratio)

    def plan(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> ClusterPlan:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        queries, query_centroids = self._cluster(q, self.query_clusters, site.grid, memory, "query centroids")
        keys, key_centroids = self._cluster(k, self.key_clusters, site.grid, memory, "key centroids")
        sizes = keys.sizes[..., None, :]
        logits = query_centroids @ key_centroids.mT * q.shape[-1] ** -0.5 + sizes.log()
        if site.grid.before + site.grid.after:
            logits[..., -1, :] = logits[..., :, -1] = torch.inf
        logits = logits.masked_fill(sizes == 0, -torch.inf)
        if self.density is None:
            keep = Mass(self.top_p, self.min_ratio).keep(logits)
        else:
            keep = top_tokens(logits, sizes, self.density * site.grid.tokens)
        return ClusterPlan.from_mask(keep, queries, keys)

    def _cluster(self, x: Tensor, clusters: int, grid: Grid, memory: dict, name: str) -> tuple[Clusters, Tensor]:
        """Return clusters of the video tokens of ``x [B, H, N, D]``, text as the last one, and their centroids."""
        video = x[:, :, grid.before : grid.before + grid.video]
        count = min(grid.video, round(clusters * (grid.video / REFERENCE_TOKENS) ** 0.5) or 1)
        iterations = self.iterations if name in memory else self.init_iterations
        video_clusters, memory[name] = kmeans(video, count, iterations, memory.get(name))
        if grid.before + grid.after == 0:
            return video_clusters, memory[name]
        text = memory[name].new_zeros(*memory[name].shape[:2], 1, x.shape[-1])
        return Clusters.from_video_labels(video_clusters.labels, count, grid), torch.cat([memory[name], text], 2)
