"""Dynamic mask attention (DMA): a bias of the keys, computed from their values, is added to the scores.

Source: J. Shi et al., "Trainable Dynamic Mask Sparse Attention", arXiv:2508.02124, sec. 3. Every head learns from the
values which keys matter, whatever the query:

    delta_j = exp(A softplus(w . v_j)),        s_ij = q_i . k_j / sqrt(D) + delta_j

and attends to the keys with the largest scores.

Planning: N^2 D / 4096 multiply-adds (means of 64 tokens).

Differs from the authors:
- Blocks are scored, by the means of their queries, keys and values.
- A is zero before the training, so that delta is constant. The untrained gate therefore also adds the log of the mean
  length of the values, with a factor that is trained: the error of a dropped block grows with its weight and its
  values.
- Distilled from the attention of a model that does not change; they train model and mask together.
- They add delta to the scores of the attention, too. Here it selects blocks only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...gating.gate import Gate, Tensors
from ...grid import Site
from ...scoring import pool

MIN_LENGTH = 1e-6  # of values, for padding


@dataclass(frozen=True, kw_only=True)
class DMA(Gate):
    """Products of means with a trained bias of the keys from their values."""

    needs_values: ClassVar[bool] = True

    def initial(self, head_dim: int) -> Tensors:
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(1, head_dim, generator=generator) * head_dim**-0.5
        return {
            "scale": torch.ones(1), "length": torch.ones(1), "A": torch.zeros(1), "w": direction, "b": torch.zeros(1)
        }  # fmt: skip

    def features(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site) -> tuple[Tensors, Tensors]:
        length = pool(v.float().norm(dim=-1, keepdim=True), site.block).clamp(min=MIN_LENGTH).log()
        keys = {"mean": pool(k, site.block), "value": pool(v, site.block), "length": length[..., 0]}
        return {"mean": pool(q, site.block)}, keys

    def gate(self, queries: Tensors, keys: Tensors, parameters: Tensors) -> Tensor:
        scale, length, a, b = (parameters[name][:, None] for name in ("scale", "length", "A", "b"))
        logits = scale[..., None] * (queries["mean"] @ keys["mean"].mT) * queries["mean"].shape[-1] ** -0.5
        projected = (keys["value"] * parameters["w"][:, None]).sum(-1) + b
        delta = (a * F.softplus(projected)).clamp(max=10).exp()
        return logits + (length * keys["length"] + delta)[..., None, :]
