"""Solve for the pattern of a given density: bisect its knob, then add single blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .grid import Grid
from .plan import num_blocks


def pair_weights(grid: Grid, block: int) -> Tensor:
    """Return the fraction of all token pairs that lies in each block pair, float64 ``[Qb, Qb]``."""
    starts = torch.arange(num_blocks(grid.tokens, block)) * block
    size = (grid.tokens - starts).clamp(max=block).double() / grid.tokens
    return size[:, None] * size


def meet_density(
    keep_at: Callable[[float], Tensor],
    knob_range: tuple[float, float],
    required: Tensor,
    weights: Tensor,
    density: float,
) -> Tensor:
    """Return the mask of a pattern at a density, bool ``[Qb, Qb]``.

    The knob adds blocks in steps. Of the step that would exceed the density, the blocks nearest to the diagonal are
    added, evenly over the rows, until the density is met.

    Args:
        keep_at: mask for a value of the knob, monotonic, with the required blocks.
        knob_range: least and greatest value of the knob.
        required: blocks to keep even if they alone exceed the density.
        weights: fraction of the token pairs in each block pair.
        density: fraction of the token pairs to keep.
    """
    measure = lambda keep: float(weights[keep].sum())
    low, high = knob_range
    inner, outer = keep_at(low), keep_at(high)
    if measure(inner) > density:
        return _fill(required, inner, weights, density)
    if measure(outer) <= density:
        return _fill(outer, torch.ones_like(outer), weights, density)
    while measure(outer) - density > 1e-3 and high / low > 1 + 1e-6:
        middle = (low * high) ** 0.5
        candidate = keep_at(middle)
        if measure(candidate) <= density:
            low, inner = middle, candidate
        else:
            high, outer = middle, candidate
    return _fill(inner, outer, weights, density)


def _fill(inner: Tensor, outer: Tensor, weights: Tensor, density: float) -> Tensor:
    """Return ``inner`` and as many blocks of ``outer`` as the density allows: nearest first, evenly over the rows."""
    extra = outer & ~inner
    position = torch.arange(len(inner))
    distance = (position[:, None] - position).abs().masked_fill(~extra, len(inner))
    rank = distance.argsort(dim=1, stable=True).argsort(dim=1)
    candidates = extra.nonzero()[rank[extra].argsort(stable=True)]
    rows, columns = candidates.unbind(1)
    fits = weights[rows, columns].cumsum(0) <= density - float(weights[inner].sum()) + 1e-9
    keep = inner.clone()
    keep[rows[fits], columns[fits]] = True
    return keep
