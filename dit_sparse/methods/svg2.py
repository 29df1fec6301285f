"""SVG2: tokens that mean the same are brought together, and whole clusters attend to whole clusters.

Source: S. Yang, H. Xi et al., "Sparse VideoGen2: Accelerate Video Generation with Sparse Attention via Semantic-Aware
Permutation", arXiv:2505.18875, sec. 4. Queries and keys of each head are clustered by k-means. With centroids q_i and
k_j and n_j keys in cluster j,

    P_ij = n_j exp(q_i . k_j / sqrt(D)) / sum_m n_m exp(q_i . k_m / sqrt(D))

estimates the attention between clusters; each query cluster keeps the fewest key clusters that reach ``share`` of it,
and never fewer than ``least`` of them. The first k-means takes ``first`` steps, later ones start from the centroids of
the plan before and take ``then``. Text is a cluster of its own that attends to and is attended by all.

Differs from the authors: the number of clusters goes with the square root of the length of the sequence and is theirs
at 720p (Wan: 300 and 1,000 clusters of 75,600 tokens), so that any grid works; k-means starts from evenly spaced
tokens, not random ones, and runs a fixed number of steps, for testing convergence waits for the device. On the bundled
model, 2,048 tokens at density .25, 10 first steps (theirs: 50) are no better than 2 (31.2 dB both), and 1 later step is
worse than 2 (30.3). The branches of guidance share not only centroids, as theirs do, but clusters and plan: clusters of
their own cost 7 dB. With ``density`` each query cluster keeps its best key clusters up to that share of the tokens, to
the nearest cluster.
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


@dataclass(frozen=True, kw_only=True)
class SVG2(Method):
    """Semantic-aware permutation.

    Attributes:
        queries, keys: number of clusters of 75,600 tokens.
        share: of the estimated attention that is kept, where no density is given.
        least: of the key clusters, at least this fraction is kept, where no density is given.
        first, then: k-means steps at the first plan, and at later ones.
    """

    clusters: ClassVar[bool] = True

    queries: int = 300
    keys: int = 1000
    share: float = 0.9
    least: float = 0.1
    first: int = 2
    then: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.queries, self.keys, self.first, self.then) < 1:
            given = f"{self.queries}, {self.keys}, {self.first}, {self.then}"
            raise ValueError(f"queries, keys, first and then are at least 1, not {given}")
        Mass(self.share, self.least)

    def plan(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> ClusterPlan:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        queries, query_centers = self._clusters(q, self.queries, site.grid, memory, "query centroids")
        keys, key_centers = self._clusters(k, self.keys, site.grid, memory, "key centroids")
        sizes = keys.sizes[..., None, :]
        logits = query_centers @ key_centers.mT * q.shape[-1] ** -0.5 + sizes.log()
        if site.grid.before + site.grid.after:
            logits[..., -1, :] = logits[..., :, -1] = torch.inf
        logits = logits.masked_fill(sizes == 0, -torch.inf)
        if self.density is None:
            keep = Mass(self.share, self.least).keep(logits)
        else:
            keep = top_tokens(logits, sizes, self.density * site.grid.tokens)
        return ClusterPlan.from_mask(keep, queries, keys)

    def _clusters(self, x: Tensor, usual: int, grid: Grid, memory: dict, name: str) -> tuple[Clusters, Tensor]:
        """Clusters of the video tokens of ``x [B, H, N, D]`` with text as the last one, and the centroid of each."""
        video = x[:, :, grid.before : grid.before + grid.video]
        count = min(grid.video, round(usual * (grid.video / 75_600) ** 0.5) or 1)
        steps = self.then if name in memory else self.first
        found, memory[name] = kmeans(video, count, steps, memory.get(name))
        if grid.before + grid.after == 0:
            return found, memory[name]
        text = memory[name].new_zeros(*memory[name].shape[:2], 1, x.shape[-1])
        return Clusters.from_video_labels(found.labels, count, grid), torch.cat([memory[name], text], 2)
