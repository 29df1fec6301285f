"""Queries, keys and values with locality, made from a grid alone, at any length.

Every head has random cosines of a token's frame, row and column (A. Rahimi, B. Recht, "Random Features for Large-Scale
Kernel Machines", 2007), the same for queries and keys, and noise beside them. So the score of two tokens is some
``PEAK * exp(-d^2 / 2)``, d being their distance in units of the head's extents, which stay what they are while the
video grows. Heads are wide in space or wide in time by turns, as those of SVG (arXiv:2502.01776).

Methods that keep a share of the mass get the density that such data has; what a real model has, `analysis` measures.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_sparse import Grid

PEAK, NOISE = 10.0, 0.5
EXTENTS = ((1.0, 8.0, 8.0), (16.0, 2.0, 2.0))  # of a wide-in-space and a wide-in-time head: frames, rows, columns


def structured(grid: Grid, heads: int, dim: int, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    """Queries and keys with locality, and random values: ``[1, heads, N, dim]``, bfloat16 on a GPU. Memory goes with N;
    text carries the place of the nearest video token."""
    generator = torch.Generator().manual_seed(seed)
    extents = torch.tensor([EXTENTS[head % len(EXTENTS)] for head in range(heads)])
    frequency = torch.randn(heads, 3, dim, generator=generator) / extents[..., None]
    phase = 2 * math.pi * torch.rand(heads, 1, dim, generator=generator)
    place = torch.stack(grid.coordinates()[:3], -1).float()
    signal = (2 * PEAK / dim**0.5) ** 0.5 * (place @ frequency + phase).cos()
    noise = lambda scale: scale * torch.randn(heads, grid.tokens, dim, generator=generator)
    made = [signal + noise(NOISE), signal + noise(NOISE), noise(1.0)]
    return [x[None].to(device, torch.bfloat16 if device == "cuda" else torch.float32) for x in made]
