"""Sparsifiner: a low-rank estimate of the attention map, with a learned basis of key positions.

Source: C. Wei et al., "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
arXiv:2303.13755, sec. 3.2. Keys are projected to a few with a basis B of their positions, a coarse softmax is computed
between queries and these, and the same basis projects it back to all keys:

    A~ = softmax(Q (B K)^T / sqrt(D)) B

The largest entries of A~ are kept. The basis is learned with the model.

Planning: 3 N D / 2 + 48 (N / b)^2 multiply-adds (48 points of the grid).

Differs from the authors:
- Rows and columns are means of blocks of queries and keys.
- The basis is (1 + W) H with the hat functions H of 3 x 4 x 4 points of the grid, so that it fits every size of video.
  Untrained, W is zero: keys are averaged around the points, and scores interpolated between them.
- Their queries and keys are first projected to half of the channels; here the product has a change of low rank, as in
  `Seer`.
- Trained on the attention of the model alone; they also train the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...gating.features import hat_functions, initial_product, scaled_product
from ...gating.gate import Gate, Tensors
from ...grid import Site
from ...notation.settings import within
from ...scoring import pool

POINTS = (3, 4, 4)
MIN_MASS = 1e-6  # of an entry of A~, which a trained basis may make negative


@dataclass(frozen=True, kw_only=True)
class Sparsifiner(Gate):
    """Low-rank attention of blocks.

    Attributes:
        rank: of the trained change of the products of queries and keys.
    """

    rank: int = within("[1, 256]", 4)

    def initial(self, head_dim: int) -> Tensors:
        points = math.prod(POINTS)
        return {"basis": torch.zeros(1, points, points)} | initial_product(head_dim, head_dim, self.rank)

    def features(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site) -> tuple[Tensors, Tensors]:
        hats = hat_functions(site.grid, site.block, POINTS, q.device)
        return {"mean": pool(q, site.block)}, {"mean": pool(k, site.block), "hats": hats[None, None]}

    def gate(self, queries: Tensors, keys: Tensors, parameters: Tensors) -> Tensor:
        hats = keys["hats"].mT
        basis = hats + parameters["basis"] @ hats  # [1, H|1, points, Qb]
        total = hats.sum(-1, keepdim=True).clamp(min=1e-3)  # 0 for points between the blocks of a small grid
        coarse = basis @ keys["mean"] / total
        logits = scaled_product(queries["mean"], coarse, coarse, parameters) + total.log().mT
        return (logits.softmax(-1) @ (basis / total)).clamp(min=MIN_MASS).log()
