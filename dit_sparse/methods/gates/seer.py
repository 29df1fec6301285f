"""SeerAttention: a trained gate on pooled queries and keys predicts the attention map of blocks.

Source: Y. Gao et al., "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", arXiv:2410.13276, sec. 3. The
gate sees the mean of the queries of a block, and the maximum, minimum and mean of its keys. With linear layers for each
head,

    s_ij = (W_q mean(Q_i)) . (W_k [max(K_j), min(K_j), mean(K_j)]) / sqrt(d)

and the softmax of its rows is distilled from the attention map of the model, pooled to blocks, by the Kullback-Leibler
divergence. The model does not change.

Planning: N^2 D / 4096 multiply-adds (means of 64 tokens).

Differs from the authors:
- The linear layers are the identity on the means, times a factor, plus a change of low rank. So an untrained gate is
  the product of the means, and the parameters of a model are small.
- They take queries and keys before RoPE and rotate the pooled ones; here they are those of the attention call, after
  RoPE.
- The target is the sum of the attention in a block, which the density is judged by; theirs is its maximum.
- Blocks that every row keeps take no part in the loss.
- Top-k at a density; the authors also use a threshold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...gating.features import extremes, initial_product, scaled_product
from ...gating.gate import Gate, Tensors
from ...grid import Site
from ...notation.settings import within
from ...scoring import pool


@dataclass(frozen=True, kw_only=True)
class Seer(Gate):
    """Products of pooled queries and keys with trained projections.

    Attributes:
        rank: of the trained change of the projections.
    """

    rank: int = within("[1, 256]", 8)

    def initial(self, head_dim: int) -> Tensors:
        return initial_product(head_dim, 3 * head_dim, self.rank)

    def features(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site) -> tuple[Tensors, Tensors]:
        means = pool(k, site.block)
        return {"mean": pool(q, site.block)}, {"mean": means, "pooled": torch.cat([extremes(k, site.block), means], -1)}

    def gate(self, queries: Tensors, keys: Tensors, parameters: Tensors) -> Tensor:
        return scaled_product(queries["mean"], keys["mean"], keys["pooled"], parameters)
