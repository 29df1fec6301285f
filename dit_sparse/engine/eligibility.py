"""Reasons why an attention call must be computed densely."""

from __future__ import annotations

import torch
from torch import Tensor

from ..grid import Grid
from .forward import AttentionCall, TokenLayout


def why_dense(layout: TokenLayout, grid: Grid | None, call: AttentionCall) -> str | None:
    """Return why a call cannot be computed sparsely, or None if it can.

    Args:
        layout: tokens of the transformer call.
        grid: ``layout`` with the text tokens of this attention call, or None if the queries do not fit it.
        call: the intercepted call.
    """
    q, k, v = call.q, call.k, call.v
    if q.shape[2] != k.shape[2] or grid is None:
        return f"{q.shape[2]} queries and {k.shape[2]} keys do not fit the grid {layout}"
    if q.shape[-1] != v.shape[-1] or not q.dtype == k.dtype == v.dtype:
        return "queries, keys and values differ in dtype or head_dim"
    if call.is_causal or call.dropout_p > 0:
        return "causal attention and dropout are not supported"
    if not (call.mask is None or isinstance(call.mask, Tensor)):
        return f"the model's attention mask is a {type(call.mask).__name__}"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "gradients are required, and the executors have no backward pass"
    if call.is_parallel:
        return "context parallelism is not supported"
    return None
