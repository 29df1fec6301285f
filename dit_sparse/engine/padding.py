"""Key lengths of batch items, read from boolean padding masks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..grid import Grid


def read_padding(mask: Tensor, batch: int, grid: Grid) -> Tensor | str:
    """Return the number of keys before the padding, ``[B]``, or why the mask is not a padding mask.

    Args:
        mask: attention mask with one entry per key, shared by all queries and heads.
        batch: B.
        grid: token grid of the call.
    """
    tokens = grid.tokens
    if mask.dtype != torch.bool:
        return "the attention mask is additive, not a boolean padding mask"
    if mask.shape[-1] != tokens or mask.numel() not in (tokens, batch * tokens):
        return f"the attention mask {list(mask.shape)} is not a padding mask over {tokens} keys"
    mask = mask.reshape(-1, tokens)
    lengths = mask.sum(-1)
    if not (mask == (torch.arange(tokens, device=mask.device) < lengths[:, None])).all():
        return "the attention mask excludes tokens in the middle of the sequence"
    if (lengths < tokens - grid.after).any():
        return "the attention mask excludes video tokens"
    return lengths.expand(batch)


class KeyLengths:
    """Key lengths by mask, cached for one transformer call because reading a mask waits for the GPU."""

    def __init__(self) -> None:
        self._cache: dict[int, tuple[Tensor, Tensor | str]] = {}  # holds the mask, so that its id stays unique

    def read(self, mask: Tensor | None, batch: int, grid: Grid) -> Tensor | str | None:
        """Return key lengths ``[B]``, None without a mask, or why the mask is not a padding mask."""
        if mask is None:
            return None
        if id(mask) not in self._cache:
            self._cache[id(mask)] = (mask, read_padding(mask, batch, grid))
        return self._cache[id(mask)][1]

    def clear(self) -> None:
        self._cache.clear()
