"""Support checks and launch arguments shared by the Triton kernels."""

from __future__ import annotations

import importlib.util
import math
import os
from functools import cache

import torch
from torch import Tensor

from .architectures import AMD, ARCHITECTURES, INTERPRETER, Architecture, Tiling, architecture

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)


def why_not(q: Tensor, k: Tensor) -> str | None:
    """Return None if the Triton attention kernels support these tensors, otherwise the unmet requirement."""
    if not is_installed():
        return "requires the package triton"
    if q.device.type != "cuda" and not is_interpreted():
        return f"requires CUDA, got {q.device.type} tensors"
    if device_architecture(q.device) is None:
        return f"requires a GPU of compute capability {min(ARCHITECTURES) / 10} or newer"
    # Triton's interpreter multiplies bfloat16 incorrectly.
    dtypes = (torch.float32, torch.float16) if is_interpreted() else (torch.bfloat16, torch.float16)
    if q.dtype not in dtypes or k.dtype != q.dtype:
        return f"requires {' or '.join(map(str, dtypes))}, the same for all inputs, got {q.dtype} and {k.dtype}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"requires a head_dim of {', '.join(map(str, HEAD_DIMS))}, got {q.shape[-1]}"
    return _why_not_differentiable(q, k)


def why_not_third_party(q: Tensor, k: Tensor) -> str | None:
    """Return the first unmet requirement that all third-party GPU attention packages share, or None."""
    if q.device.type != "cuda":
        return f"requires CUDA, got {q.device.type} tensors"
    if q.dtype not in (torch.bfloat16, torch.float16) or k.dtype != q.dtype:
        return f"requires bfloat16 or float16, the same for all inputs, got {q.dtype} and {k.dtype}"
    return _why_not_differentiable(q, k)


def _why_not_differentiable(q: Tensor, k: Tensor) -> str | None:
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return "has no backward pass, got inputs that require grad; call it under torch.no_grad()"
    return None


def prefers_triton(x: Tensor) -> bool:
    """Return whether functions with a PyTorch and a Triton implementation use Triton for ``x``: on supported GPUs."""
    return x.is_cuda and is_installed() and device_architecture(x.device) is not None


def chunk_elements(x: Tensor) -> int:
    """Return how many scores the PyTorch implementations compute at once on x's device. On a CPU these are 2 MiB, which
    stay in its cache until they are read again."""
    return 1 << (22 if x.is_cuda else 19)


@cache
def is_installed() -> bool:
    """Return whether the package triton is installed."""
    return importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    """Return whether Triton interprets its kernels in Python on the CPU, as the tests do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def device_architecture(device: torch.device) -> Architecture | None:
    """Return the launch settings for a device, or None if its GPU is too old."""
    if is_interpreted():
        return INTERPRETER
    if torch.version.hip:
        return AMD
    major, minor = torch.cuda.get_device_capability(device)
    return architecture(10 * major + minor)


def attention_arguments(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, tiling: Tiling, queries: int
) -> tuple[dict, Tensor, Tensor]:
    """Return the arguments that the two attention kernels share, and their outputs.

    Args:
        q: ``[B, H, N, D]``.
        k, v: ``[B, Hkv, N, D]``, in the order of the plan's keys.
        scale: of the scores; None: ``D ** -0.5``.
        tiling: the launch settings.
        queries: queries of one program.

    Returns:
        The arguments, and the empty tensors ``out``, like q, and ``lse``, float32 ``[B, H, N]``.
    """
    q, scale = with_positive_scale(q, scale)
    widths = tiling.tile_widths(queries, q.shape[-1])
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    arguments = dict(
        pointers_or_descriptors({"k": k, "v": v}, tiling.keys, widths, tiling.tma),
        q=q,
        out=out,
        lse=lse,
        q_strides=q.stride()[:3],
        k_strides=k.stride()[:3],
        v_strides=v.stride()[:3],
        out_strides=out.stride()[:3],
        heads=q.shape[1],
        group_size=q.shape[1] // k.shape[1],
        tokens=q.shape[2],
        scale=base_2_scale(scale, q.shape[-1]),
        KEYS=tiling.keys,
        WIDTHS=widths,
        TMA=tiling.tma,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return arguments, out, lse


def with_positive_scale(q: Tensor, scale: float | None) -> tuple[Tensor, float | None]:
    """Return queries and a scale greater than 0 that give the same scaled scores. Kernels require it that scale the
    maximum of the scores instead of every score."""
    if scale is None or not scale <= 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)


def base_2_scale(scale: float | None, dim: int) -> float:
    """Return the factor from scores to base-2 logarithms of weights. ``scale`` None: ``dim ** -0.5``."""
    return (dim**-0.5 if scale is None else scale) * math.log2(math.e)


def pointers_or_descriptors(tensors: dict[str, Tensor], keys: int, widths: tuple[int, ...], tma: bool) -> dict:
    """Return the kernel arguments ``name`` and ``name_rest`` for tensors ``[B, H, N, D]``.

    Without ``tma`` both are the tensor itself. With ``tma``, ``name`` is a tensor descriptor of tiles with ``keys``
    rows and the first width, and ``name_rest`` one for the second width, if there is one. They are separate arguments
    because Triton cannot launch a kernel with a tuple of descriptors.
    """
    if not tma:
        return {name + suffix: x for name, x in tensors.items() for suffix in ("", "_rest")}
    first, rest = (*widths, widths[-1])[:2]
    return {
        name + suffix: _tensor_descriptor(x, keys, width)
        for name, x in tensors.items()
        for suffix, width in (("", first), ("_rest", rest))
    }


def _tensor_descriptor(x: Tensor, rows: int, columns: int):
    """Return a descriptor of ``x [B, H, N, D]`` for tiles of ``[1, 1, rows, columns]``. Copies ``x`` if its address or
    strides are not multiples of 16 bytes."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    aligned = x.data_ptr() % 16 == 0 and all(s and s * x.element_size() % 16 == 0 for s in x.stride()[:3])
    x = x if aligned else x.contiguous()
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, columns])


def with_contiguous_rows(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors with a contiguous last dimension, copied if necessary."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def schedule_longest_first(work: Tensor, heads_at_once: int) -> Tensor:
    """Return the order in which the programs of all heads start, int32 ``[B * H * R]``.

    Args:
        work: amount of work of each program, ``[B, H, R]``.
        heads_at_once: heads whose programs are sorted together, longest first, so that no long program runs alone at
            the end. These groups of heads follow one another.
    """
    work = work.flatten(0, 1)
    head_group = torch.arange(len(work), device=work.device) // heads_at_once
    return (head_group[:, None] * (work.amax() + 1) - work).flatten().argsort(stable=True).int()


def heads_in_l2_cache(k: Tensor, l2_cache: int) -> int:
    """Return how many heads of ``k [B, Hkv, N, D]`` fit with their values in half of ``l2_cache`` bytes, at least 1."""
    return max(1, l2_cache // (4 * k.shape[2] * k.shape[3] * k.element_size()))
