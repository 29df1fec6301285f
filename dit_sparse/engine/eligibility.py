"""Reasons why an attention call must be computed densely."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..grid import Grid
from ..pipelines.family import GridShape


def why_dense(
    shape: GridShape, grid: Grid | None, q: Tensor, k: Tensor, causal_or_dropout: bool, processor: Any
) -> str | None:
    """Return why a call cannot be computed sparsely, or None if it can.

    Args:
        shape: frames, height and width of the video tokens.
        grid: ``shape`` with the text tokens of this call, or None if the queries do not fit it.
        q, k: queries and keys, ``[B, H, N, D]``.
        causal_or_dropout: whether the call is causal or has dropout.
        processor: the attention processor of the module.
    """
    if q.shape[2] != k.shape[2] or grid is None:
        return f"{q.shape[2]} queries and {k.shape[2]} keys do not fit the grid {'x'.join(map(str, shape))}"
    if causal_or_dropout:
        return "causal attention and dropout are not supported"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return "gradients are required, and the executors have no backward pass"
    if getattr(processor, "_parallel_config", None) is not None:
        return "context parallelism is not supported"
    return None
