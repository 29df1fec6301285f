"""Voxel sets for tests: surfaces of any number of voxels, in random order and with negative coordinates."""

from __future__ import annotations

import torch
from torch import Tensor


def surface(voxels: int, seed: int = 0) -> Tensor:
    """Return the ``voxels`` cells nearest to a sphere around the origin, in random order, int64 ``[voxels, 3]``."""
    radius = max(1, round((voxels / 12) ** 0.5))
    axis = torch.arange(-radius - 2, radius + 3)
    cells = torch.cartesian_prod(axis, axis, axis)
    nearest = (cells.double().norm(dim=1) - radius).abs().argsort(stable=True)[:voxels]
    return cells[nearest[torch.randperm(voxels, generator=torch.Generator().manual_seed(seed))]]


def packed(*sizes: int, seed: int = 0) -> Tensor:
    """Return the voxels of several batch items, one after the other, int64 ``[T, 4]``."""
    parts = [torch.nn.functional.pad(surface(n, seed + i), (1, 0), value=i) for i, n in enumerate(sizes)]
    return torch.cat(parts)
