"""Groups of tokens of any size, and plans between them: what semantic permutation makes of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import Grid
from .plan import BasePlan, lists_from_mask, repeat_batch


@dataclass(frozen=True)
class Clusters:
    """Tokens sorted into clusters; every batch item and head may have its own.

    Attributes:
        order: int64 ``[B|1, H|1, N]``; place i of the sorted sequence holds token ``order[..., i]``.
        edges: int32 ``[B|1, H|1, C + 1]``, from 0 to N: cluster c holds the places ``edges[..., c]`` up to
            ``edges[..., c + 1]``. It may hold none.
    """

    order: Tensor
    edges: Tensor

    @classmethod
    def from_labels(cls, labels: Tensor, clusters: int) -> Clusters:
        """From the cluster of every token, integers ``[B|1, H|1, N]`` below ``clusters``. Tokens of one cluster keep
        their order, so padding that has the highest label stays at the end."""
        narrow = torch.int16 if clusters < 1 << 15 else torch.int32  # a GPU sorts two bytes in a fourth of the passes
        labels, order = labels.to(narrow).sort(dim=-1, stable=True)
        bounds = torch.arange(clusters + 1, device=labels.device, dtype=labels.dtype).expand(*labels.shape[:-1], -1)
        return cls(order, torch.searchsorted(labels, bounds.contiguous(), out_int32=True))

    @classmethod
    def from_video_labels(cls, labels: Tensor, clusters: int, grid: Grid) -> Clusters:
        """Return clusters from the labels of the video tokens alone, ``[B|1, H|1, F * h * w]``.

        All text tokens form one more cluster, the last one, so that padding stays at the end."""
        if grid.tokens == grid.video:
            return cls.from_labels(labels, clusters)
        of_all = labels.new_full((*labels.shape[:-1], grid.tokens), clusters)
        of_all[..., grid.before : grid.before + grid.video] = labels
        return cls.from_labels(of_all, clusters + 1)

    @property
    def sizes(self) -> Tensor:
        """Tokens in each cluster, int64 ``[B|1, H|1, C]``."""
        return self.edges.diff(dim=-1).long()

    @property
    def labels(self) -> Tensor:
        """The cluster of every token, int64 ``[B|1, H|1, N]``."""
        places = torch.arange(self.order.shape[-1], device=self.order.device, dtype=torch.int32)
        sorted_labels = torch.searchsorted(
            self.edges[..., 1:].contiguous(), places.expand(*self.edges.shape[:-1], -1).contiguous(), right=True
        )
        return torch.empty_like(self.order).scatter_(-1, self.order, sorted_labels.expand_as(self.order))

    def to(self, device: torch.device | str) -> Clusters:
        return Clusters(self.order.to(device), self.edges.to(device))

    def repeat_batch(self) -> Clusters:
        """The same clusters for a batch in which every item stands twice, in two equal halves."""
        return Clusters(repeat_batch(self.order), repeat_batch(self.edges))


@dataclass(frozen=True)
class ClusterPlan(BasePlan):
    """Lists of key clusters for every query cluster.

    Attributes:
        queries, keys: the clusters of both sides; their numbers may differ.
        lengths: as in `Plan`; padding stands at the end of ``keys.order``, so text that may be padding is sorted last.
    """

    queries: Clusters
    keys: Clusters
    lengths: Tensor | None = None

    @classmethod
    def from_mask(cls, keep: Tensor, queries: Clusters, keys: Clusters) -> ClusterPlan:
        """From a boolean map ``keep [B|1, H|1, Cq, Ck]``.

        Raises:
            ValueError: a row keeps nothing, or the map does not fit the clusters.
        """
        expected = [clusters.edges.shape[-1] - 1 for clusters in (queries, keys)]
        if keep.ndim != 4 or list(keep.shape[-2:]) != expected:
            raise ValueError(f"these clusters need a map [B, H, {expected[0]}, {expected[1]}], not {list(keep.shape)}")
        return cls(*lists_from_mask(keep), queries, keys)

    @property
    def tokens(self) -> int:
        return self.queries.order.shape[-1]

    @property
    def order(self) -> Tensor:
        """The order of the keys, ``[B|1, H|1, N]``."""
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
