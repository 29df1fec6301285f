"""Block-sparse attention in Triton, for NVIDIA GPUs from Ampere on."""

from __future__ import annotations

import importlib.util
import math
import os
from functools import cache

import torch
from torch import Tensor

from dit_sparse.plan import Plan

from .architectures import ARCHITECTURES, INTERPRETER, Architecture, architecture

LSE = True

BLOCKS = (16, 32, 64, 128)
WIDTHS = {16: (16, 0), 32: (32, 0), 64: (64, 0), 80: (64, 16), 96: (64, 32), 128: (128, 0), 256: (256, 0)}


def why_not(q: Tensor, k: Tensor, plan: Plan) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if q.device.type != "cuda" and not interpreted():
        return f"it runs on a GPU and the tensors are on {q.device}"
    if machine(q.device) is None:
        return f"it needs a GPU of compute capability {min(ARCHITECTURES) / 10} or newer"
    # Triton's interpreter multiplies bfloat16 wrongly.
    dtypes = (torch.float32, torch.float16) if interpreted() else (torch.bfloat16, torch.float16)
    if q.dtype not in dtypes or k.dtype != q.dtype:
        return f"it computes in {' or '.join(map(str, dtypes))}, one for all inputs, not {q.dtype} with {k.dtype}"
    if q.shape[-1] not in WIDTHS:
        return f"head_dim must be one of {', '.join(map(str, WIDTHS))}, not {q.shape[-1]}"
    if plan.block not in BLOCKS:
        return f"a block must have {', '.join(map(str, BLOCKS))} tokens, not {plan.block}"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return "it has no backward pass and the inputs require grad"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention of ``q [B, H, N, D]`` over the kept blocks of ``k, v [B, Hkv, N, D]`` (Hkv divides H).

    Queries are read, and the output is written, through the plan's order; only keys and values are moved.

    Returns:
        out ``[B, H, N, D]`` with q's dtype and memory layout, and the natural-log-sum-exp of the kept scores,
        float32 ``[B, H, N]``. A row without any valid key gives 0 and -inf.
    """
    from .block_sparse_triton import forward

    arguments, out, lse = launch(q, k, v, plan, scale, machine(q.device))
    with torch.cuda.device_of(q):
        forward[(len(arguments["schedule"]),)](**arguments)
    return out, lse


def launch(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None, machine: Architecture
) -> tuple[dict, Tensor, Tensor]:
    """The arguments of the kernel, and the two tensors that it will fill."""
    batch, heads, tokens, dim = q.shape
    (width, width_rest), tiling = WIDTHS[dim], machine.tiling(plan.block, dim)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, plan.arrange(k), plan.arrange(v)))
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    index, count = plan.index.expand(batch, heads, -1, -1), plan.count.expand(batch, heads, -1)
    order = None if plan.order is None else plan.order.expand(batch, heads, -1)
    cells = {"k": (k, width), "v": (v, width), "k_rest": (k, width_rest), "v_rest": (v, width_rest)}
    arguments = dict(
        {name: descriptor(x, tiling.keys, columns) if tiling.tma else x for name, (x, columns) in cells.items()},
        q=q,
        out=out,
        lse=lse,
        index=index,
        count=count,
        order=order,
        lengths=plan.lengths,
        schedule=schedule(plan, batch, heads, machine.cache // (4 * tokens * dim * q.element_size())),
        q_strides=q.stride()[:3],
        k_strides=k.stride()[:3],
        v_strides=v.stride()[:3],
        out_strides=out.stride()[:3],
        index_strides=index.stride()[:3],
        count_strides=count.stride(),
        order_strides=(0, 0) if order is None else order.stride()[:2],
        heads=heads,
        group=heads // k.shape[1],
        tokens=tokens,
        scale=(dim**-0.5 if scale is None else scale) * math.log2(math.e),
        BLOCK=plan.block,
        KEYS=tiling.keys,
        WIDTH=width,
        WIDTH_REST=width_rest,
        TMA=tiling.tma,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return arguments, out, lse


def schedule(plan: Plan, batch: int, heads: int, heads_in_cache: int) -> Tensor:
    """In which order the rows of all heads start, int32 ``[B * H * Qb]``: the longest first, so that none of them is
    left alone at the end, but head after head, as many at once as keep their keys and values in half the cache."""
    count = plan.count.expand(batch, heads, -1).flatten(0, 1)
    company = torch.arange(batch * heads, device=count.device) // max(1, heads_in_cache)
    return (company[:, None] * (plan.index.shape[-1] + 1) - count).flatten().argsort(stable=True).int()


def descriptor(x: Tensor, rows: int, columns: int):
    """A descriptor of ``x [B, H, N, D]`` in cells of ``[1, 1, rows, columns]``, which the hardware fetches at once."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    aligned = x.data_ptr() % 16 == 0 and all(s and s * x.element_size() % 16 == 0 for s in x.stride()[:3])
    x = x if aligned else x.contiguous()
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, max(columns, 16)])


def interpreted() -> bool:
    """Whether Triton runs its programs in Python, on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def machine(device: torch.device) -> Architecture | None:
    if interpreted():
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return architecture(10 * major + minor)
