"""A GPU that is not there: tensors on it have a shape, a type and a device, and no numbers (PyTorch's fake tensors).

Whatever runs on the way to a kernel runs here too, so that a tensor on the wrong device, a wait for a number, and
arguments that no kernel could take are found without a GPU. Tensors on the CPU stay real. Kernels do not run: they are
noted, with what they were handed.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attention_cases import lacking
from dit_sparse import method as methods
from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.gpu.architectures import ARCHITECTURES

PROGRAMS = {
    "block_sparse": ("forward",),
    "block_ragged": ("forward",),
    "block_mass": ("mass",),
    "cluster": ("assign", "means"),
    "permute": ("permute",),
    "selection": ("select",),
}
# PyTorch without CUDA knows no such device when it indexes a tensor on one; nothing has to be done for it.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard());
"""


class OnlyTheGPU(TorchDispatchMode):
    """Whatever touches a pretended GPU has no numbers, everything else is computed. Refuses to wait for the GPU."""

    def __init__(self, calls: Counter) -> None:
        super().__init__()
        self.fake, self.calls = FakeTensorMode(allow_non_fake_inputs=True), calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == "cuda") for x in leaves):
            return func(*args, **kwargs)
        with self.fake:
            result = func(*args, **kwargs)
        assert all(x.is_cuda for x in tree_leaves(result) if isinstance(x, Tensor)), f"{func} waits for the GPU"
        self.calls[func.overloadpacket.__name__] += 1
        return result


class Program:
    """In the place of a Triton program: looks at what it is handed, and notes that it was launched."""

    def __init__(self, program, launched: Counter) -> None:
        self.name, self.launched = program.__name__, launched
        self.takes = set(program.arg_names)

    def __getitem__(self, grid):
        def run(**arguments) -> None:
            given = set(arguments) - {"num_warps", "num_stages"}
            assert given == self.takes, f"{self.name} gets other arguments: {given ^ self.takes}"
            assert all(isinstance(size, int) and 0 < size < 2**31 for size in grid), f"{self.name} launched as {grid}"
            for name, value in arguments.items():
                for x in tree_leaves(value):
                    assert not isinstance(x, Tensor) or x.is_cuda, f"{self.name} gets {name} on the CPU"
            self.launched[self.name] += 1

        return run


class Event:
    """In the place of a CUDA event."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 1.0


@contextmanager
def pretended_gpu(monkeypatch, capability: int = 90) -> Iterator[Counter]:
    """A GPU of that compute capability; yields how often each program and each of PyTorch's operations ran there."""
    _guard()
    launched = Counter()
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes its tensor on the CPU first
    try:
        with monkeypatch.context() as patch, OnlyTheGPU(launched):
            _pretend(patch, capability, launched)
            yield launched
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)
        methods._cut.cache_clear()


def _pretend(patch, capability: int, launched: Counter) -> None:
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(torch.cuda, "Event", Event)
    patch.setattr(torch.cuda, "device_of", lambda x: nullcontext())
    patch.setattr(launching, "interpreted", lambda: False)
    patch.setattr(launching, "machine", lambda device: ARCHITECTURES[capability])
    patch.setattr(launching, "_descriptor", lambda x, rows, columns: x)  # it looks at an address
    for module, names in PROGRAMS.items():
        found = importlib.import_module(f"dit_sparse.kernels.gpu.{module}")
        for name in names:
            patch.setattr(found, name, Program(getattr(found, name), launched))


@cache
def _guard() -> None:
    """Compiled once a process, which keeps it: an unused entry in a table. Skips where there is no compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        lacking("there is no C++ compiler (g++ or clang++) on the PATH")
    home = Path(torch.__file__).parent
    options = ["-shared", "-fPIC", "-std=c++20", f"-I{home / 'include'}", f"-L{home / 'lib'}", "-lc10"]
    with TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        subprocess.run([compiler, source, "-o", library, *options], check=True)
        torch.ops.load_library(str(library))
