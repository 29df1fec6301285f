"""SwinBERT: one trained mask for each head, the same for all videos, with a price on its entries.

Source: K. Lin et al., "SwinBERT: End-to-End Transformers with Sparse Attention for Video Captioning", arXiv:2111.13196,
sec. 3.2. A mask sigmoid(E) over pairs of video tokens multiplies the attention and is trained with a price on its mean,

    loss = task loss + lambda mean(sigmoid(E))

and binarised afterwards. For longer clips the mask is repeated, or interpolated between frames.

Planning: 16 (N / b)^2 multiply-adds (interpolated tables).

Differs from the authors:
- E is interpolated from two small tables for each head: one of the offset between query and key, as fractions of
  frames, rows and columns, and one of the position of the key. So it fits every size of video.
- Untrained, it is the negative distance between query and key.
- Each row keeps its largest entries at the density; the authors keep those above 0.5.
- The task loss is the attention mass that the mask drops. By default there is no price, and E is trained like the other
  gates: on `shapes-wan` this keeps more of the mass at a density, because a price separates the entries above and
  below it but does not rank them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...gating.features import block_positions
from ...gating.gate import Gate, Tensors
from ...grid import Site
from ...notation.settings import within

OFFSETS = (13, 13, 5)  # of -1 to 1, frames, rows and columns: a block holds whole rows or parts of them
POSITIONS = (5, 7, 3)  # of 0 to 1


@dataclass(frozen=True, kw_only=True)
class SwinBERT(Gate):
    """A trained mask of each head.

    Attributes:
        price: lambda of the authors' loss, with which entries pay for themselves if they hold more than lambda times
            the mean mass; None: the loss of `Gate`.
    """

    price: float | None = within("(0, 1000]", None)

    def initial(self, head_dim: int) -> Tensors:
        axes = (torch.linspace(-1, 1, number) for number in OFFSETS)
        distance = torch.stack(torch.meshgrid(*axes, indexing="ij")).norm(dim=0)
        return {"offset": -4 * distance[None], "position": torch.zeros(1, *POSITIONS)}

    def features(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site) -> tuple[Tensors, Tensors]:
        positions = block_positions(site.grid, site.block, q.device)[None, None]
        return {"position": positions}, {"position": positions}

    def gate(self, queries: Tensors, keys: Tensors, parameters: Tensors) -> Tensor:
        offset = keys["position"][:, :, None] - queries["position"][:, :, :, None]  # [B, 1, R, Qb, 3]
        bias = _interpolate(parameters["position"], 2 * keys["position"][:, :, None] - 1)
        return _interpolate(parameters["offset"], offset) + bias

    def loss(self, scores: Tensor, mass: Tensor) -> Tensor:
        if self.price is None:
            return super().loss(scores, mass)
        mask = scores.sigmoid()
        return (mass * (1 - mask)).sum(-1).mean() + self.price * mask.mean()

    def shape_settings(self) -> dict:
        return {}  # the price matters to the training alone


def _interpolate(table: Tensor, points: Tensor) -> Tensor:
    """Return the values of tables ``[H, frames, rows, columns]`` at points in [-1, 1], ``[B, 1, R, K, 3]``, linearly
    interpolated: ``[B, H, R, K]``."""
    points = points.flip(-1)  # grid_sample takes column, row, frame
    values = F.grid_sample(table.expand(len(points), *table.shape), points, padding_mode="border", align_corners=True)
    return values[:, :, 0]
