"""Why an attention call cannot be sparse, in words, and how much of it is padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..grid import Grid
from ..pipelines.family import Shape


def why_dense(shape: Shape, grid: Grid | None, q: Tensor, k: Tensor, inexact: bool, processor: Any) -> str | None:
    """Why this call cannot be sparse, in words; None where it can."""
    if q.shape[2] != k.shape[2] or grid is None:
        return f"{q.shape[2]} queries and {k.shape[2]} keys do not fit the grid {'x'.join(map(str, shape))}"
    if inexact:
        return "causal attention and dropout are not supported"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return "gradients are asked for, and the executors have no backward pass"
    if getattr(processor, "_parallel_config", None) is not None:
        return "context parallelism is not supported"
    return None


def read_padding(mask: Tensor, batch: int, grid: Grid) -> Tensor | str:
    tokens = grid.tokens
    if mask.dtype != torch.bool:
        return "the attention mask is additive, not a boolean padding mask"
    if mask.shape[-1] != tokens or mask.numel() not in (tokens, batch * tokens):
        return f"the attention mask {list(mask.shape)} is no padding mask over {tokens} keys"
    mask = mask.reshape(-1, tokens)
    lengths = mask.sum(-1)
    if not (mask == (torch.arange(tokens, device=mask.device) < lengths[:, None])).all():
        return "the attention mask leaves out tokens in the middle of the sequence"
    if (lengths < tokens - grid.after).any():
        return "the attention mask leaves out video tokens"
    return lengths.expand(batch)
