"""Random textures: marble, stripes and felt, each with a fine grain that tells one token from thousands of others.

Each function returns ``[3, height, width]`` around 0, on the scale of pixels in [-1, 1].
"""

from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor


def marble(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return clouds of two sizes with dark veins."""
    field = _clouds(height, width, 16, generator) + 0.5 * _clouds(height, width, 8, generator)
    veins = torch.exp(-(field / 0.16).square())
    clouds = 0.18 * _clouds(height, width, 20, generator) + 0.10 * _clouds(height, width, 6, generator)
    return clouds - 0.30 * veins + _grain(height, width, generator)


def stripes(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return wavy stripes in a random direction, 9 pixels apart."""
    angle = pi * torch.rand((), generator=generator)
    distance = torch.arange(width) * angle.cos() + torch.arange(height)[:, None] * angle.sin()
    phase = 2 * pi / 9 * distance + 1.5 * _clouds(height, width, 16, generator)
    return 0.22 * torch.tanh(2 * torch.sin(phase)) + _grain(height, width, generator)


def felt(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return small irregular spots."""
    spots = 0.12 * _clouds(height, width, 4, generator) + 0.10 * _clouds(height, width, 10, generator)
    return spots + _grain(height, width, generator)


def _clouds(height: int, width: int, cell: int, generator: torch.Generator) -> Tensor:
    """Return smooth noise whose values are independent at distances above ``cell`` pixels, ``[1, height, width]``."""
    noise = torch.randn(1, 1, height // cell + 4, width // cell + 4, generator=generator)
    smooth = F.interpolate(noise, scale_factor=cell, mode="bicubic")[0]
    return smooth[:, cell : cell + height, cell : cell + width]


def _grain(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return grain of one and two pixels in brightness, and of two pixels in colour, ``[3, height, width]``."""
    fine = 0.07 * torch.randn(1, height, width, generator=generator)
    cells = (height // 2 + 1, width // 2 + 1)
    coarse = 0.10 * torch.randn(1, *cells, generator=generator) + 0.05 * torch.randn(3, *cells, generator=generator)
    return fine + coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :height, :width]
