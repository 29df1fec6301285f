"""Sparse attention as one function: no pipeline, no diffusers."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .grid import Grid, Site
from .kernels.pick import pick
from .method import AttentionOutput, Method
from .methods import method as method_named
from .plan import Plan


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Grid,
    method: str | Method = "radial",
    density: float | None = 0.25,
    lengths: Tensor | None = None,
    block: int = 64,
    executor: str = "auto",
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sparse self-attention, one call of it: to a method that lives on earlier steps every call is the first.

    Args:
        q: queries after RoPE, ``[B, H, N, D]``.
        k, v: keys and values, ``[B, Hkv, N, D]``; Hkv divides H.
        grid: where the N tokens lie.
        method: a name, or a Method, which then decides its density itself unless ``density`` is given with a name.
        density: fraction of the pairs to compute, with a method's name.
        lengths: real tokens of each batch item where the sequence ends in padding, ``[B]``.
        block: tokens in a block.
        executor: "auto" or a name, which runs or raises.
        scale: of the scores; None: ``1 / sqrt(D)``.

    Returns:
        out ``[B, H, N, D]`` in q's dtype, and the natural log-sum-exp, float32 ``[B, H, N]`` (None from an executor
        that has none).

    Raises:
        ValueError: shapes that do not fit each other or the grid, or an unknown method.
        RuntimeError: the named executor cannot run here; the message says why.
    """
    _check(q, k, v, grid, lengths, block)
    if isinstance(method, str):
        method = method_named(method, density=density)
    if not isinstance(method, Method):
        raise ValueError(f"a method is a name or a dit_sparse.Method, not {type(method).__name__}")
    site, memory = Site(grid, block), {}
    method.begin_generation(q, site)
    plan = method.plan(q, k, site, memory) or Plan.dense(grid.tokens, block, q.device)
    if lengths is not None and plan.order is not None and lengths.min() < grid.tokens - grid.after:
        raise ValueError("padding must be text at the end of the sequence: this method reorders the video tokens")
    plan = plan.with_lengths(lengths)
    attend = partial(pick(executor, q, k, plan, lse=method.needs_lse).executor.attend, q, k, v, scale=scale)
    done = AttentionOutput(q, k, v, plan, scale, *attend(plan=plan), lambda: attend(plan=plan.full()))
    return method.correct(done, site, memory)


def _check(q: Tensor, k: Tensor, v: Tensor, grid: Grid, lengths: Tensor | None, block: int) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(f"q, k and v are [batch, heads, tokens, head_dim], not {shapes}")
    heads_fit = k.shape[1] and q.shape[1] % k.shape[1] == 0
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:] or not heads_fit:
        raise ValueError(f"k and v must match q, with a number of heads that divides q's: {shapes}")
    if block < 1:
        raise ValueError(f"block is the number of tokens in a block, at least 1, not {block}")
    if q.shape[2] != grid.tokens:
        raise ValueError(f"the grid {grid} has {grid.tokens} tokens, but q has {q.shape[2]}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point() and q.device == k.device == v.device):
        raise ValueError("q, k and v must share one floating-point dtype and one device")
    if lengths is not None and (
        lengths.shape != (q.shape[0],) or not ((lengths >= 1) & (lengths <= grid.tokens)).all()
    ):
        raise ValueError(f"lengths is one number of real tokens per batch item, 1 to {grid.tokens}")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("there is no backward pass; call under torch.no_grad()")
