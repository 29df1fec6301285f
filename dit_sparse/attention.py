"""Sparse self-attention as a function of q, k and v, without a diffusers pipeline."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .grid import Grid, Site
from .kernels.pick import pick
from .method import AttentionOutput, Method
from .methods import method_at_density
from .plan import Plan


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Grid,
    method: str | Method = "radial",
    density: float | None = None,
    lengths: Tensor | None = None,
    block: int = 64,
    executor: str = "auto",
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute sparse self-attention. No state is kept: for methods that reuse earlier steps every call is the first.

    Args:
        q: queries after RoPE, ``[B, H, N, D]``.
        k, v: keys and values, ``[B, Hkv, N, D]``; Hkv divides H.
        grid: layout of the N tokens.
        method: a Method, or its text such as ``"radial"``, ``"radial(sink=true)"`` or ``"pooled(svg)"``.
        density: fraction of the query-key pairs to compute, for a method given as text; a Method has its own. Default:
            0.25 if the text has no settings.
        lengths: tokens of each batch item before its padding, ``[B]``; None: no padding.
        block: tokens in a block.
        executor: "auto" or the name of an executor.
        scale: factor of the scores; None: ``1 / sqrt(D)``.

    Returns:
        Output ``[B, H, N, D]`` in the dtype of q, and natural log-sum-exp, float32 ``[B, H, N]`` (None if the executor
        returns none).

    Raises:
        ValueError: the shapes do not fit each other or the grid, or the method is unknown.
        RuntimeError: the named executor cannot run here.
    """
    _check(q, k, v, grid, lengths, block)
    if isinstance(method, str):
        method = method_at_density(method, density)
    if not isinstance(method, Method):
        raise ValueError(f"method must be a text or a dit_sparse.Method, got {type(method).__name__}")
    site, memory = Site(grid, block), {}
    method.begin_generation(q, site)
    plan = method.plan(q, k, site, memory) or Plan.dense(grid.tokens, block, q.device)
    if lengths is not None and plan.order is not None and lengths.min() < grid.tokens - grid.after:
        raise ValueError("padding must be text at the end of the sequence, because this method reorders video tokens")
    plan = plan.with_lengths(lengths)
    attend = partial(pick(executor, q, k, plan, lse=method.needs_lse).executor.attend, q, k, v, scale=scale)
    result = AttentionOutput(q, k, v, plan, scale, *attend(plan=plan), lambda: attend(plan=plan.full()))
    return method.correct(result, site, memory)


def _check(q: Tensor, k: Tensor, v: Tensor, grid: Grid, lengths: Tensor | None, block: int) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(f"q, k and v must be [batch, heads, tokens, head_dim], got {shapes}")
    heads_fit = k.shape[1] and q.shape[1] % k.shape[1] == 0
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:] or not heads_fit:
        raise ValueError(f"k and v must match q, and their number of heads must divide that of q, got {shapes}")
    if block < 1:
        raise ValueError(f"block, the number of tokens in a block, must be at least 1, got {block}")
    if q.shape[2] != grid.tokens:
        raise ValueError(f"the grid {grid} has {grid.tokens} tokens, but q has {q.shape[2]}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point() and q.device == k.device == v.device):
        raise ValueError("q, k and v must have the same floating-point dtype and the same device")
    if lengths is not None and (
        lengths.shape != (q.shape[0],) or not ((lengths >= 1) & (lengths <= grid.tokens)).all()
    ):
        raise ValueError(f"lengths must hold one number for each batch item, from 1 to {grid.tokens}")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("sparse attention has no backward pass: call it under torch.no_grad()")
