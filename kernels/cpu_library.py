"""C++ operators for x86 CPUs (`kernels/cpu/`), compiled with the local compiler at first use."""

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

from .cache import cache_folder, writable_cache_folder

_SOURCES = Path(__file__).with_name("cpu")
_log = logging.getLogger("dit_sparse")


def why_not(name: str) -> str | None:
    """Compile and load the operators of ``kernels/cpu/<name>.cpp``, once per process. Return None, or why that is not
    possible on this machine."""
    return _missing_requirement() or build_error(name)


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
def build_error(name: str) -> str | None:
    """Compile and load a library once per process. Return None, or why that failed."""
    try:
        torch.ops.load_library(compiled_library(name))
    except BuildError as error:
        return str(error)
    except OSError as error:
        return f"the compiled operator cannot be loaded: {_error_line(str(error))}"
    return None


def compiled_library(name: str) -> Path:
    """Return the library for a source, and this compiler, PyTorch and CPU; compile it if the cache folder does not have
    it."""
    source = _SOURCES / f"{name}.cpp"
    texts = [file.read_text() for file in (source, *sorted(_SOURCES.glob("*.h")))]
    compiler = _compiler()
    compile_flags, link_flags = _compile_flags(), _link_flags()
    identity = [*texts, *compiler, _version(compiler), *compile_flags, *link_flags]
    identity += [torch.__version__, torch.backends.cpu.get_cpu_capability(), _cpu_flags()]
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    file_name = f"cpu_{name}_{digest}.so"
    if (cached := cache_folder() / file_name).exists():
        return cached
    folder = writable_cache_folder()
    library = folder / file_name
    _log.info("compiling the CPU operator %s, once on this machine; it takes about 10 seconds", name)
    _log.debug("with %s into %s", shlex.join(compiler), library)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as build_folder:
        object_file, shared_object = Path(build_folder, "kernel.o"), Path(build_folder, "kernel.so")
        _run([*compiler, *compile_flags, "-c", str(source), "-o", str(object_file)])
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
