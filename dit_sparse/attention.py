"""Sparse self-attention as a function of q, k and v, without a diffusers pipeline."""

from __future__ import annotations

import sys
from functools import partial
from numbers import Integral, Real

import torch
from torch import Tensor

from .composition import check_grid
from .grid import BaseGrid, Site, short_repr
from .kernels.pick import pick
from .method import AttentionOutput, Method
from .methods import default_method, method_at_density
from .plan import Plan
from .scoring import without_padding

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_BLOCK = 4096  # executors store all scores of a pair of blocks
WHOLE_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: BaseGrid,
    method: str | Method | None = None,
    density: float | None = None,
    lengths: Tensor | None = None,
    block: int = 64,
    executor: str = "auto",
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute sparse self-attention. No state is kept between calls: methods that reuse earlier steps treat every call
    as the first step.

    Args:
        q: queries after RoPE, ``[B, H, N, D]``, float16, bfloat16, float32 or float64.
        k, v: keys and values, ``[B, Hkv, N, D]``, with the dtype and the device of q; Hkv divides H.
        grid: layout of the N tokens: a Grid, or a VoxelGrid for voxels in any order. The batch items of a packed
            VoxelGrid are computed separately.
        method: a Method, or its text such as ``"radial"``, ``"radial(sink=true)"`` or ``"pooled(svg)"``. Default:
            ``"routed"``, for voxels ``"svg2"``.
        density: fraction of the query-key pairs to compute, for a method given as text; a Method has its own. Default:
            0.25 if the text has no settings.
        lengths: tokens of each batch item before its padding, whole numbers ``[B]``; None: no padding. Padded rows may
            contain any values.
        block: tokens in a block, at most 4096.
        executor: "auto" or the name of an executor.
        scale: factor of the scores, any finite number; None: ``1 / sqrt(D)``.

    Returns:
        Output ``[B, H, N, D]`` in the dtype of q, and natural log-sum-exp, float32 ``[B, H, N]`` (None if the executor
        returns none).

    Raises:
        ValueError: an argument has the wrong type or value, the shapes do not fit each other or the grid, or the method
            is unknown or does not apply to the grid.
        RuntimeError: the named executor cannot run here.
    """
    _check_tensors(q, k, v)
    _check_settings(grid, lengths, block, scale, q)
    if method is None or isinstance(method, str):
        method = method_at_density(default_method(grid) if method is None else method, density)
    if not isinstance(method, Method):
        raise ValueError(f"method must be a text or a dit_sparse.Method, got {type(method).__name__}")
    check_grid(method, grid)
    attend = partial(_attend, method=method, lengths=lengths, block=int(block), executor=executor, scale=scale)
    items = [(None if tokens is None else tokens.to(q.device), item) for tokens, item in grid.items()]
    if lengths is not None and lengths.min() < grid.tokens - grid.after and items[0][0] is not None:
        raise ValueError("padding must be text at the end of the sequence, because voxels are reordered")
    if items[0][0] is None:
        return attend(q, k, v, grid=grid)
    parts = [attend(*(x.index_select(2, tokens) for x in (q, k, v)), grid=item) for tokens, item in items]
    inverse = torch.cat([tokens for tokens, _ in items]).argsort()
    outs, lses = zip(*parts, strict=True)
    lse = None if lses[0] is None else torch.cat(lses, 2).index_select(2, inverse)
    return torch.cat(outs, 2).index_select(2, inverse), lse


def _attend(
    q: Tensor, k: Tensor, v: Tensor, *, grid: BaseGrid, method: Method, lengths: Tensor | None, block: int,
    executor: str, scale: float | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute sparse self-attention of one item whose tokens are in the order of ``grid``."""
    site, memory = Site(grid, block), {}
    method.begin_generation(q, site)
    visible = [q, k, v if method.needs_values else None]
    if lengths is not None:
        visible = [None if x is None else without_padding(x, lengths) for x in visible]
    plan = method.plan(*visible, site, memory) or Plan.dense(grid.tokens, block, q.device)
    if lengths is not None and plan.order is not None and lengths.min() < grid.tokens - grid.after:
        raise ValueError("padding must be text at the end of the sequence, because this method reorders video tokens")
    plan = plan.with_lengths(lengths)
    attend = partial(pick(executor, q, k, plan, lse=method.needs_lse).executor.attend, q, k, v, scale=scale)
    result = AttentionOutput(q, k, v, plan, scale, *attend(plan=plan), lambda: attend(plan=plan.full()))
    return method.correct(result, site, memory)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    if wrong := [type(x).__name__ for x in (q, k, v) if not isinstance(x, Tensor)]:
        raise ValueError(f"q, k and v must be torch tensors, got {wrong[0]}")
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(f"q, k and v must be [batch, heads, tokens, head_dim], got {shapes}")
    heads_fit = k.shape[1] and q.shape[1] % k.shape[1] == 0
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:] or not heads_fit:
        raise ValueError(f"k and v must match q, and their number of heads must divide that of q, got {shapes}")
    if not q.numel():
        raise ValueError(f"q, k and v must not be empty, got {shapes}")
    kinds = {(x.dtype, x.device) for x in (q, k, v)}
    if len(kinds) > 1 or q.dtype not in DTYPES:
        given = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"q, k and v must have the same floating-point dtype and the same device, got {given}")
    if q.is_meta:
        raise ValueError("q, k and v must hold values, got tensors of the device 'meta'")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("sparse attention has no backward pass: call it under torch.no_grad()")


def _check_settings(grid: BaseGrid, lengths: Tensor | None, block: int, scale: float | None, q: Tensor) -> None:
    is_a = lambda value, kind: isinstance(value, kind) and not isinstance(value, bool)
    if not isinstance(grid, BaseGrid):
        given = type(grid).__name__
        raise ValueError(
            f"grid must be a dit_sparse.Grid, such as Grid(21, 45, 80), or a VoxelGrid(voxels), got {given}"
        )
    if not is_a(block, Integral) or not 1 <= block <= MAX_BLOCK:
        raise ValueError(f"block must be a whole number of tokens from 1 to {MAX_BLOCK}, got {short_repr(block)}")
    if scale is not None and not (is_a(scale, Real) and abs(scale) <= sys.float_info.max):
        raise ValueError(f"scale must be a finite number or None, got {short_repr(scale)}")
    if q.shape[2] != grid.tokens:
        raise ValueError(f"the grid {grid} has {grid.tokens} tokens, but q has {q.shape[2]}")
    if lengths is None:
        return
    is_whole = isinstance(lengths, Tensor) and lengths.dtype in WHOLE_DTYPES and lengths.shape == (len(q),)
    if not is_whole or not ((lengths >= 1) & (lengths <= grid.tokens)).all():
        given = f"{lengths.dtype} {lengths.tolist()}" if isinstance(lengths, Tensor) else type(lengths).__name__
        expected = f"a tensor with a whole number from 1 to {grid.tokens} for each batch item"
        raise ValueError(f"lengths must be {expected}, got {given[:60]}")
