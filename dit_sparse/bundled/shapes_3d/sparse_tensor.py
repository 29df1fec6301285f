"""Packed sparse tensors of several items, and their attention, as in TRELLIS (arXiv:2412.01506)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class SparseTensor:
    """Values at voxels of one or more items.

    Attributes:
        feats: values, ``[T, ...]``.
        coords: item and coordinates of each voxel, int64 ``[T, 4]``; the voxels of an item are consecutive.
    """

    feats: Tensor
    coords: Tensor

    def replace(self, feats: Tensor) -> SparseTensor:
        """Return other values at the same voxels."""
        return replace(self, feats=feats)

    @property
    def sizes(self) -> list[int]:
        """Number of voxels of each item."""
        return self.coords[:, 0].unique_consecutive(return_counts=True)[1].tolist()

    @classmethod
    def pack(cls, feats: Sequence[Tensor], coordinates: Sequence[Tensor]) -> SparseTensor:
        """Pack items of values ``[V, ...]`` and coordinates ``[V, 3]``."""
        coords = [F.pad(one, (1, 0), value=item) for item, one in enumerate(coordinates)]
        return cls(torch.cat(list(feats)), torch.cat(coords))


def sparse_scaled_dot_product_attention(qkv: SparseTensor, kv: Tensor | None = None) -> SparseTensor:
    """Return the attention within each item, with feats ``[T, H, D]``.

    Args:
        qkv: queries, keys and values ``[T, 3, H, D]``; with ``kv``, queries ``[T, H, D]``.
        kv: keys and values of cross-attention, ``[B, M, 2, H, D]``, one set for each item.
    """
    outputs = []
    for item, own in enumerate(qkv.feats.split(qkv.sizes)):
        q, k, v = own.unbind(1) if kv is None else (own, *kv[item].unbind(1))
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        outputs.append(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1))
    return qkv.replace(torch.cat(outputs))
