"""Concentration of attention: the share of its mass on the top blocks of keys."""

import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # tokens
DENSITY = 0.25  # fraction of the key blocks


def attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """Return the softmax of the scaled scores, ``[B, H, N, N]``, of queries and keys ``[B, H, N, D]``."""
    return (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)


def top_block_mass(weights: Tensor) -> Tensor:
    """Return the attention mass on the top key blocks, ``[H]``, averaged over the complete query blocks.

    Args:
        weights: attention weights ``[B, H, N, N]``.
    """
    tokens = weights.shape[-1]
    complete, blocks = tokens // BLOCK, -(-tokens // BLOCK)
    padded = F.pad(weights[..., : complete * BLOCK, :], (0, blocks * BLOCK - tokens))
    mass = padded.unflatten(-1, (blocks, BLOCK)).sum(-1).unflatten(-2, (complete, BLOCK)).mean(-2)
    return mass.topk(round(DENSITY * blocks), dim=-1).values.sum(-1).mean(dim=(0, 2))
