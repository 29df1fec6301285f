"""Parts that several gates share: pooled features, products of low rank, and positions of blocks in the grid."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..grid import BaseGrid
from ..scoring import pool


def extremes(x: Tensor, block: int) -> Tensor:
    """Return the largest and the smallest value of each channel in every block, ``[B, H, N, D] -> [B, H, Qb, 2D]``."""
    whole = x.shape[2] // block * block
    parts = [x[:, :, :whole].unflatten(2, (whole // block, block))] if whole else []
    if whole < x.shape[2]:
        parts.append(x[:, :, None, whole:])
    return torch.cat([torch.cat([part.amax(3), part.amin(3)], -1) for part in parts], 2).float()


def initial_product(queries: int, keys: int, rank: int) -> dict[str, Tensor]:
    """Return the parameters of `scaled_product` with which it is the product of the means: the change of low rank is
    zero, because that of the keys is.

    Args:
        queries, keys: number of features that the change reads.
        rank: of the change.
    """
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, queries, rank, generator=generator) * queries**-0.5
    return {
        "scale": torch.ones(1), "query": query, "query_bias": torch.ones(1, rank), "key": torch.zeros(1, keys, rank)
    }  # fmt: skip


def scaled_product(
    query_means: Tensor, key_means: Tensor, key_features: Tensor, parameters: dict[str, Tensor]
) -> Tensor:
    """Return ``scale q . k / sqrt(D) + (q W_q + b) . (f W_k) / sqrt(rank)`` for all pairs of blocks.

    Args:
        query_means: q, ``[B, H, R, D]``.
        key_means, key_features: k and f, ``[B, H, Qb, D]`` and ``[B, H, Qb, F]``.
        parameters: as from `initial_product`, of each head or the same for all.
    """
    scale, rank = parameters["scale"][:, None, None], parameters["key"].shape[-1]
    logits = scale * (query_means @ key_means.mT) * query_means.shape[-1] ** -0.5
    change = query_means @ parameters["query"] + parameters["query_bias"][:, None]
    return logits + change @ (key_features @ parameters["key"]).mT * rank**-0.5


@lru_cache(maxsize=16)
def block_positions(grid: BaseGrid, block: int, device: torch.device) -> Tensor:
    """Return the mean position of the tokens of each block as fractions of frames, rows and columns, ``[Qb, 3]``."""
    return pool(_token_positions(grid)[None, None], block)[0, 0].to(device)


@lru_cache(maxsize=16)
def hat_functions(grid: BaseGrid, block: int, points: tuple[int, int, int], device: torch.device) -> Tensor:
    """Return the hat functions of evenly spaced points, averaged over the tokens of each block, ``[Qb, points]``.

    Linear interpolation between values at the points is a product with this matrix. Its rows sum to 1.
    """
    weights = torch.ones(grid.tokens, 1)
    for position, number in zip(_token_positions(grid).unbind(1), points, strict=True):
        distance = position[:, None] * (number - 1) - torch.arange(number)
        weights = (weights[:, :, None] * (1 - distance.abs()).clamp(min=0)[:, None]).flatten(1)
    return pool(weights[None, None], block)[0, 0].to(device)


def _token_positions(grid: BaseGrid) -> Tensor:
    """Positions of the tokens as fractions of the grid: 0 is the first, 1 the last; the middle of an axis of length 1.
    Float32 ``[N, 3]``."""
    *axes, _ = grid.coordinates()
    pairs = zip(axes, grid.sides, strict=True)
    return torch.stack([axis / (size - 1) if size > 1 else torch.full((grid.tokens,), 0.5) for axis, size in pairs], 1)
