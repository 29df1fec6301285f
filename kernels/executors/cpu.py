"""Block-sparse attention on the CPU: a C++ operator that the machine's own compiler builds at first use."""

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
from dit_sparse.kernels.cache import cache_folder
from dit_sparse.plan import Plan

LSE = True
CLUSTERS = True

_SOURCE = Path(__file__).with_name("cpu_block_sparse.cpp")
_HEADER = Path(__file__).with_name("cpu_tiles.h")
_MOST_HEAD_DIM = 512
_log = logging.getLogger("dit_sparse")


def why_not(q: Tensor, k: Tensor, plan: Plan | ClusterPlan) -> str | None:
    """None when :func:`attend` can run, else one sentence. Builds the operator when all else is well."""
    if q.device.type != "cpu":
        return f"it runs on the CPU and the tensors are on {q.device}"
    if q.dtype not in (torch.float32, torch.bfloat16) or k.dtype != q.dtype:
        return f"it computes in float32 or bfloat16, one for all inputs, not {q.dtype} with {k.dtype}"
    if q.shape[-1] % 8 or not 8 <= q.shape[-1] <= _MOST_HEAD_DIM:
        return f"head_dim must be a multiple of 8 up to {_MOST_HEAD_DIM}, not {q.shape[-1]}"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return "it has no backward pass and the inputs require grad"
    return _missing_from_machine() or _build_failure()


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan | ClusterPlan, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of ``q [B, H, N, D]`` over the kept blocks of ``k, v [B, Hkv, N, D]`` (Hkv divides H).

    Returns:
        out ``[B, H, N, D]`` with q's dtype and memory layout, and the natural-log-sum-exp of the kept scores,
        float32 ``[B, H, N]``. A row without any valid key gives 0 and -inf.
    """
    if reason := _build_failure():
        raise RuntimeError(f"the CPU executor cannot run: {reason}")
    batch, heads, tokens, dim = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32)
    clusters = isinstance(plan, ClusterPlan)
    orders = (plan.queries.order, plan.keys.order) if clusters else (plan.order, plan.order)
    edges = (plan.queries.edges, plan.keys.edges) if clusters else (None, None)
    by_key_head = (x for x in (orders[1], edges[1]) if x is not None and x.ndim == 3)
    torch.ops.dit_sparse_cpu.attend_into(
        out,
        lse,
        q,
        k,
        v,
        _per_head(plan.index, torch.int32, batch, heads),
        _per_head(plan.count, torch.int32, batch, heads),
        _per_head(orders[0], torch.int64, batch, heads),
        _per_head(edges[0], torch.int32, batch, heads),
        _per_head(orders[1], torch.int64, batch, heads),
        _per_head(edges[1], torch.int32, batch, heads),
        any(x.shape[1] > 1 for x in by_key_head),
        plan.lengths if plan.lengths is None else plan.lengths.to(torch.int32).contiguous(),
        0 if clusters else plan.block,
        dim**-0.5 if scale is None else scale,
    )
    return out, lse


def _per_head(x: Tensor | None, dtype: torch.dtype, batch: int, heads: int) -> Tensor | None:
    """A part of a plan, ``[K]`` or ``[B|1, H|1, ..., K]``, as ``[B, H, ..., K]``, broadcast by stride 0."""
    if x is None:
        return None
    x = x.to(dtype).contiguous()
    return x.expand(batch, heads, *x.shape[2:] if x.ndim > 1 else x.shape)


def _missing_from_machine() -> str | None:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"it is written for x86 Linux, not {platform.machine()} {platform.system()}"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "the CPU has no AVX2"
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN"
    return None


class BuildError(RuntimeError):
    """The operator could not be compiled or loaded; the message is one sentence."""


@cache
def _build_failure() -> str | None:
    """Builds and loads the operator once per process; None, or the reason why that failed."""
    try:
        torch.ops.load_library(_built_library())
    except BuildError as error:
        return str(error)
    except OSError as error:
        return f"the build failed because {_last_line(str(error))}"
    return None


def _built_library() -> Path:
    """The library for this source, compiler, torch and CPU, compiled unless the cache folder has it."""
    compiler = _compiler()
    compile_flags, link_flags = _compile_flags(), _link_flags()
    identity = [_SOURCE.read_text(), _HEADER.read_text(), *compiler, _version(compiler), *compile_flags, *link_flags]
    identity += [torch.__version__, torch.backends.cpu.get_cpu_capability(), _cpu_flags()]
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    folder = cache_folder()
    library = folder / f"cpu_block_sparse_{digest}.so"
    if library.exists():
        return library
    _log.info("compiling the CPU attention kernel with %s into %s", shlex.join(compiler), library)
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        unlinked, linked = Path(aside, "kernel.o"), Path(aside, "kernel.so")
        _run([*compiler, *compile_flags, "-c", str(_SOURCE), "-o", str(unlinked)])
        _run([*compiler, "-shared", str(unlinked), "-o", str(linked), *link_flags])
        os.replace(linked, library)
    _log.debug("compiled in %.1f s", time.perf_counter() - started)
    return library


def _compiler() -> list[str]:
    """The C++ compiler's command: CXX when set, else the first usual name on the path."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler found (looked for {', '.join(candidates)})")


def _compile_flags() -> list[str]:
    flags = ["-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"]
    flags += ["-fopenmp", "-fPIC"]
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        flags.append("-mprefer-vector-width=512")
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    headers = Path(torch.__file__).parent / "include"
    return [*flags, f"-isystem{headers}", f"-isystem{headers / 'torch/csrc/api/include'}"]


def _link_flags() -> list[str]:
    # No -fopenmp here: OpenMP's symbols must come from the runtime torch has loaded, never from a second one.
    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]


def _version(compiler: list[str]) -> str:
    answer = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    return answer.stdout


def _cpu_flags() -> str:
    """The CPU's features: what -march=native builds must not reach another CPU through a shared cache."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("flags")), "")


def _run(command: list[str]) -> None:
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        said = _last_line(answer.stderr or answer.stdout) or f"{command[0]} exits {answer.returncode}"
        raise BuildError(f"the build failed because {said}")


def _last_line(text: str) -> str:
    """The last line that names an error, else the last line."""
    lines = text.strip().splitlines() or [""]
    return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1]).strip()
