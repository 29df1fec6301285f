"""What the Triton kernels share before they start: what they can run, and how tensors are handed over."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

from .architectures import AMD, ARCHITECTURES, INTERPRETER, Architecture, architecture

DIMS = (16, 32, 64, 80, 96, 128, 256)


def why_not(q: Tensor, k: Tensor) -> str | None:
    """Why no Triton kernel can take these tensors, or None."""
    if not installed():
        return "the package triton is not installed"
    if q.device.type != "cuda" and not interpreted():
        return f"it runs on a GPU and the tensors are on {q.device}"
    if machine(q.device) is None:
        return f"it needs a GPU of compute capability {min(ARCHITECTURES) / 10} or newer"
    # Triton's interpreter multiplies bfloat16 wrongly.
    dtypes = (torch.float32, torch.float16) if interpreted() else (torch.bfloat16, torch.float16)
    if q.dtype not in dtypes or k.dtype != q.dtype:
        return f"it computes in {' or '.join(map(str, dtypes))}, one for all inputs, not {q.dtype} with {k.dtype}"
    if q.shape[-1] not in DIMS:
        return f"head_dim must be one of {', '.join(map(str, DIMS))}, not {q.shape[-1]}"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return "it has no backward pass and the inputs require grad"
    return None


def why_not_elsewhere(who: str, q: Tensor, k: Tensor) -> str | None:
    """Why another package's attention cannot take these tensors, or None: what all such packages have in common."""
    if q.device.type != "cuda":
        return f"{who} runs on a GPU and the tensors are on {q.device}"
    if q.dtype not in (torch.bfloat16, torch.float16) or k.dtype != q.dtype:
        return f"{who} computes in bfloat16 or float16, one for all inputs, not {q.dtype} with {k.dtype}"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return f"{who} is called without a backward pass and the inputs require grad"
    return None


def preferred(x: Tensor) -> bool:
    """Whether a function that has a plain form too takes its Triton form: on a GPU. The interpreter is for tests."""
    return x.is_cuda and installed() and machine(x.device) is not None


def scores_at_once(x: Tensor) -> int:
    """How many numbers the plain PyTorch in the place of a kernel makes at a time: on a CPU 2 MiB, which are still in
    its cache when they are read again."""
    return 1 << (22 if x.is_cuda else 19)


@cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton runs its programs in Python, on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def machine(device: torch.device) -> Architecture | None:
    if interpreted():
        return INTERPRETER
    if torch.version.hip:
        return AMD
    major, minor = torch.cuda.get_device_capability(device)
    return architecture(10 * major + minor)


def fetched(names: dict[str, Tensor], keys: int, columns: tuple[int, ...], tma: bool) -> dict:
    """Each tensor ``[B, H, N, D]`` under its name: as a pointer or, where ``tma`` is set, as a descriptor of cells of
    ``keys`` rows and its first columns; under name_rest again, as a descriptor of its further columns if there are any.
    They are no tuple because Triton launches no tuples of descriptors."""
    if not tma:
        return {name + suffix: x for name, x in names.items() for suffix in ("", "_rest")}
    first, rest = (*columns, columns[-1])[:2]
    return {
        name + suffix: _descriptor(x, keys, width)
        for name, x in names.items()
        for suffix, width in (("", first), ("_rest", rest))
    }


def _descriptor(x: Tensor, rows: int, columns: int):
    """A descriptor of ``x [B, H, N, D]`` in cells of ``[1, 1, rows, columns]``, which the hardware fetches at once."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    aligned = x.data_ptr() % 16 == 0 and all(s and s * x.element_size() % 16 == 0 for s in x.stride()[:3])
    x = x if aligned else x.contiguous()
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, columns])


def in_rows(*tensors: Tensor) -> list[Tensor]:
    """Tensors whose last dimension is dense in memory; copied where it is not."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def longest_first(work: Tensor, company: int) -> Tensor:
    """In which order the programs of all heads start, int32 ``[B * H * R]``, by what each has to do, ``[B, H, R]``: the
    longest first, so that none of them is left alone at the end, but head after head, ``company`` heads at once."""
    work = work.flatten(0, 1)
    first_of = torch.arange(len(work), device=work.device) // company
    return (first_of[:, None] * (work.amax() + 1) - work).flatten().argsort(stable=True).int()


def company(k: Tensor, cache: int) -> int:
    """How many heads of ``k [B, Hkv, N, D]`` keep their keys and values in half of a cache of so many bytes."""
    return max(1, cache // (4 * k.shape[2] * k.shape[3] * k.element_size()))
