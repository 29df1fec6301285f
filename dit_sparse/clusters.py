"""Clusters of tokens of any size, and plans between them, as for semantic permutation (SVG2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import Grid
from .kernels.key_lists import lists_from_mask
from .plan import BasePlan, repeat_batch


@dataclass(frozen=True)
class Clusters:
    """Tokens sorted by cluster, for each batch item and head.

    Attributes:
        order: int64 ``[B|1, H|1, N]``; position i of the sorted sequence holds token ``order[..., i]``.
        edges: int32 ``[B|1, H|1, C + 1]``, from 0 to N; cluster c is ``order[..., edges[c] : edges[c + 1]]`` and may
            be empty.
    """

    order: Tensor
    edges: Tensor

    @classmethod
    def from_labels(cls, labels: Tensor, clusters: int) -> Clusters:
        """Sort tokens by their cluster, integers ``[B|1, H|1, N]`` below ``clusters``.

        The sort is stable, so padding with the highest label stays at the end.
        """
        narrow = torch.int16 if clusters < 1 << 15 else torch.int32  # a GPU sorts int16 in a fourth of the passes
        labels, order = labels.to(narrow).sort(dim=-1, stable=True)
        bounds = torch.arange(clusters + 1, device=labels.device, dtype=labels.dtype).expand(*labels.shape[:-1], -1)
        return cls(order, torch.searchsorted(labels, bounds.contiguous(), out_int32=True))

    @classmethod
    def from_video_labels(cls, labels: Tensor, clusters: int, grid: Grid) -> Clusters:
        """Sort tokens by the cluster of the video tokens, ``[B|1, H|1, video]``.

        All text tokens form one more cluster, the last one, so that padding stays at the end.
        """
        if grid.tokens == grid.video:
            return cls.from_labels(labels, clusters)
        all_labels = labels.new_full((*labels.shape[:-1], grid.tokens), clusters)
        all_labels[..., grid.before : grid.before + grid.video] = labels
        return cls.from_labels(all_labels, clusters + 1)

    @property
    def sizes(self) -> Tensor:
        """Tokens in each cluster, int64 ``[B|1, H|1, C]``."""
        return self.edges.diff(dim=-1).long()

    @property
    def labels(self) -> Tensor:
        """Cluster of every token, int64 ``[B|1, H|1, N]``."""
        positions = torch.arange(self.order.shape[-1], device=self.order.device, dtype=torch.int32)
        sorted_labels = torch.searchsorted(
            self.edges[..., 1:].contiguous(), positions.expand(*self.edges.shape[:-1], -1).contiguous(), right=True
        )
        return torch.empty_like(self.order).scatter_(-1, self.order, sorted_labels.expand_as(self.order))

    def to(self, device: torch.device | str) -> Clusters:
        """Return the clusters on another device."""
        return Clusters(self.order.to(device), self.edges.to(device))

    def repeat_batch(self) -> Clusters:
        """Return the clusters for the batch repeated twice, ``[B, ...] -> [2 B, ...]``."""
        return Clusters(repeat_batch(self.order), repeat_batch(self.edges))

    def __len__(self) -> int:
        return self.edges.shape[-1] - 1

    def __repr__(self) -> str:
        return f"Clusters({self.order.shape[-1]} tokens in {len(self)} clusters)"


@dataclass(frozen=True)
class ClusterPlan(BasePlan):
    """Plan of clusters: which key clusters each query cluster attends to.

    Attributes:
        queries, keys: clusters of the queries and of the keys; their numbers may differ.
        lengths: as in `Plan`; padding must stay at the end of ``keys.order``, so text is sorted last.
    """

    queries: Clusters
    keys: Clusters
    lengths: Tensor | None = None
    tail: int | None = None
    first_query: int = 0

    @classmethod
    def from_mask(cls, keep: Tensor, queries: Clusters, keys: Clusters) -> ClusterPlan:
        """Return the plan of a boolean mask ``keep [B|1, H|1, Cq, Ck]``.

        Raises:
            ValueError: the mask does not fit the clusters, or a row is empty.
        """
        if keep.ndim != 4 or keep.shape[-2:] != (len(queries), len(keys)):
            shape = f"[B, H, {len(queries)}, {len(keys)}]"
            raise ValueError(f"these clusters need a mask {shape}, got {list(keep.shape)}")
        return cls(*lists_from_mask(keep), queries, keys)

    @property
    def tokens(self) -> int:
        """Length of the sequence, N."""
        return self.queries.order.shape[-1]

    @property
    def order(self) -> Tensor:
        """Order of the keys, ``[B|1, H|1, N]``."""
        return self.keys.order

    @property
    def query_sizes(self) -> Tensor:
        return self.queries.sizes

    @property
    def key_sizes(self) -> Tensor:
        return self.keys.sizes

    @property
    def query_group(self) -> Tensor:
        return self.queries.labels

    @property
    def key_group(self) -> Tensor:
        return self.keys.labels

    def __repr__(self) -> str:
        return self._repr(f"{len(self.queries)} x {len(self.keys)} clusters")
