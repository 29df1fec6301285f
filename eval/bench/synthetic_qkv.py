"""Synthetic queries, keys and values with locality, for a grid of any length.

Every head has random cosines of a token's frame, row and column (A. Rahimi, B. Recht, "Random Features for Large-Scale
Kernel Machines", 2007), the same for queries and keys, plus noise. The score of two tokens is about
``PEAK * exp(-d^2 / 2)``, where d is their distance in units of the head's extents; the extents do not change with the
length of the video. Heads alternate between wide in space and wide in time, like those of SVG (arXiv:2502.01776).

Methods that keep a share of the attention mass get the density of this data; `mask_analysis` measures that of a model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_sparse import Grid

PEAK, NOISE = 10.0, 0.5
EXTENTS = ((1.0, 8.0, 8.0), (16.0, 2.0, 2.0))  # frames, rows, columns of a wide-in-space and a wide-in-time head


def synthetic_qkv(grid: Grid, heads: int, dim: int, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    """Return queries and keys with locality, and random values.

    Args:
        grid: the sequence. Text tokens have the coordinates of the nearest video token.
        heads, dim: shape of the tensors.
        device: ``"cpu"`` or ``"cuda"``.
        seed: of the random numbers.

    Returns:
        q, k and v, ``[1, heads, N, dim]`` each, bfloat16 on a GPU and float32 on a CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    extents = torch.tensor([EXTENTS[head % len(EXTENTS)] for head in range(heads)])
    frequency = torch.randn(heads, 3, dim, generator=generator) / extents[..., None]
    phase = 2 * math.pi * torch.rand(heads, 1, dim, generator=generator)
    position = torch.stack(grid.coordinates()[:3], -1).float()
    signal = (2 * PEAK / dim**0.5) ** 0.5 * (position @ frequency + phase).cos()
    noise = lambda scale: scale * torch.randn(heads, grid.tokens, dim, generator=generator)
    tensors = [signal + noise(NOISE), signal + noise(NOISE), noise(1.0)]
    return [x[None].to(device, torch.bfloat16 if device == "cuda" else torch.float32) for x in tensors]
