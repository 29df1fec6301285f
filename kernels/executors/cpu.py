"""Block-sparse attention for x86 CPUs: a C++ operator, compiled with the local compiler at first use."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dit_sparse.clusters import ClusterPlan
from dit_sparse.kernels.cache import cache_folder, writable_cache_folder
from dit_sparse.kernels.gpu.launching import with_positive_scale
from dit_sparse.kernels.tail import with_tail
from dit_sparse.plan import Plan

LSE = True
CLUSTERS = True

_SOURCE = Path(__file__).with_name("cpu_block_sparse.cpp")
_HEADER = Path(__file__).with_name("cpu_tiles.h")
_MAX_HEAD_DIM = 512
_log = logging.getLogger("dit_sparse")


def why_not(q: Tensor, k: Tensor, plan: Plan | ClusterPlan) -> str | None:
    """See `executors`. Compiles the operator if the tensors and the machine are supported."""
    if q.device.type != "cpu":
        return f"requires CPU tensors, got {q.device.type} tensors"
    if q.dtype not in (torch.float32, torch.bfloat16) or k.dtype != q.dtype:
        return f"requires float32 or bfloat16, the same for all inputs, got {q.dtype} and {k.dtype}"
    if q.shape[-1] % 8 or not 8 <= q.shape[-1] <= _MAX_HEAD_DIM:
        return f"requires a head_dim that is a multiple of 8, at most {_MAX_HEAD_DIM}, got {q.shape[-1]}"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return "has no backward pass, got inputs that require grad; call it under torch.no_grad()"
    return _missing_requirement() or _build_error()


@with_tail
def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan | ClusterPlan, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Compute attention as specified in `executors`. ``out`` has q's memory layout.

    Raises:
        RuntimeError: the operator cannot be compiled or loaded.
        IndexError: the plan holds the number of a key group that does not exist.
    """
    if reason := _build_error():
        raise RuntimeError(f"executor 'cpu' is unavailable: {reason}")
    batch, heads, tokens, dim = q.shape
    q, scale = with_positive_scale(q, scale)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32)
    clusters = isinstance(plan, ClusterPlan)
    orders = (plan.queries.order, plan.keys.order) if clusters else (plan.order, plan.order)
    edges = (plan.queries.edges, plan.keys.edges) if clusters else (None, None)
    per_head_fields = (x for x in (orders[1], edges[1]) if x is not None and x.ndim == 3)
    torch.ops.dit_sparse_cpu.attend_into(
        out,
        lse,
        q,
        k,
        v,
        _expand_per_head(plan.index, torch.int32, batch, heads),
        _expand_per_head(plan.count, torch.int32, batch, heads),
        _expand_per_head(orders[0], torch.int64, batch, heads),
        _expand_per_head(edges[0], torch.int32, batch, heads),
        _expand_per_head(orders[1], torch.int64, batch, heads),
        _expand_per_head(edges[1], torch.int32, batch, heads),
        any(x.shape[1] > 1 for x in per_head_fields),
        plan.lengths if plan.lengths is None else plan.lengths.to(torch.int32).contiguous(),
        0 if clusters else plan.block,
        dim**-0.5 if scale is None else scale,
    )
    return out, lse


def _expand_per_head(x: Tensor | None, dtype: torch.dtype, batch: int, heads: int) -> Tensor | None:
    """Expand a field of a plan, ``[K]`` or ``[B|1, H|1, ..., K]``, to ``[B, H, ..., K]`` without a copy."""
    if x is None:
        return None
    x = x.to(dtype).contiguous()
    return x.expand(batch, heads, *x.shape[2:] if x.ndim > 1 else x.shape)


def _missing_requirement() -> str | None:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"requires Linux on x86_64, got {platform.system()} on {platform.machine()}"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "requires a CPU with AVX2"
    if not torch.backends.mkldnn.is_available():
        return "requires a build of PyTorch with oneDNN"
    return None


class BuildError(RuntimeError):
    """The operator cannot be compiled; the message says why."""


@cache
def _build_error() -> str | None:
    """Compile and load the operator once per process. Return None, or why that failed."""
    try:
        torch.ops.load_library(_compiled_library())
    except BuildError as error:
        return str(error)
    except OSError as error:
        return f"the compiled operator cannot be loaded: {_error_line(str(error))}"
    return None


def _compiled_library() -> Path:
    """Return the library for this source, compiler, PyTorch and CPU; compile it if the cache folder does not have
    it."""
    compiler = _compiler()
    compile_flags, link_flags = _compile_flags(), _link_flags()
    identity = [_SOURCE.read_text(), _HEADER.read_text(), *compiler, _version(compiler), *compile_flags, *link_flags]
    identity += [torch.__version__, torch.backends.cpu.get_cpu_capability(), _cpu_flags()]
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    file_name = f"cpu_block_sparse_{digest}.so"
    if (cached := cache_folder() / file_name).exists():
        return cached
    folder = writable_cache_folder()
    library = folder / file_name
    _log.info("compiling the CPU attention operator with %s into %s", shlex.join(compiler), library)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as build_folder:
        object_file, shared_object = Path(build_folder, "kernel.o"), Path(build_folder, "kernel.so")
        _run([*compiler, *compile_flags, "-c", str(_SOURCE), "-o", str(object_file)])
        _run([*compiler, "-shared", str(object_file), "-o", str(shared_object), *link_flags])
        os.replace(shared_object, library)  # atomic: other processes never see a partial file
    _log.debug("compiled in %.1f s", time.perf_counter() - started)
    return library


def _compiler() -> list[str]:
    """Return the command of the C++ compiler: $CXX if set, else the first of c++, g++ and clang++ on the PATH."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
    raise BuildError(f"requires a C++ compiler on the PATH, found none of {', '.join(candidates)}")


def _compile_flags() -> list[str]:
    flags = ["-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"]
    flags += ["-fopenmp", "-fPIC"]
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        flags.append("-mprefer-vector-width=512")
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    headers = Path(torch.__file__).parent / "include"
    return [*flags, f"-isystem{headers}", f"-isystem{headers / 'torch/csrc/api/include'}"]


def _link_flags() -> list[str]:
    # Without -fopenmp, OpenMP symbols resolve to the runtime that PyTorch has already loaded.
    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]


def _version(compiler: list[str]) -> str:
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _cpu_flags() -> str:
    """Return the CPU's feature flags. A library compiled with -march=native must not run on a CPU with other
    features."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("flags")), "")


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        message = _error_line(result.stderr or result.stdout) or f"{command[0]} exited with {result.returncode}"
        raise BuildError(f"compiling the CPU operator failed: {message}")


def _error_line(text: str) -> str:
    """Return the last line that contains "error", else the last line."""
    lines = text.strip().splitlines() or [""]
    return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1]).strip()
