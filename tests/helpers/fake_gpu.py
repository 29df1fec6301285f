"""A fake CUDA device: its tensors are PyTorch's fake tensors, with shape, dtype and device but no data.

The Python code on the way to a kernel runs as on a GPU, so tensors on the wrong device, synchronization, and arguments
that no kernel accepts are found without one. Tensors on the CPU stay real. Triton kernels do not run; their launches
are checked and counted.
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

from attention_cases import skip_or_fail
from dit_sparse import method as methods
from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.gpu.architectures import ARCHITECTURES

KERNELS = {
    "block_sparse": ("block_sparse_kernel",),
    "block_ragged": ("block_ragged_kernel",),
    "block_mass": ("block_mass_kernel",),
    "pooling_error": ("mass_and_spread_kernel", "pooling_error_kernel"),
    "cluster": ("nearest_centroid_kernel", "cluster_mean_kernel"),
    "permute": ("permute_rows_kernel",),
    "selection": ("select_top_kernel",),
}
# Indexing a tensor requires a device guard of its device type, which PyTorch without CUDA does not have for CUDA.
DEVICE_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard());
"""


class FakeCudaMode(TorchDispatchMode):
    """Run operations on CUDA tensors with fake tensors, and all others as usual. Fails on synchronization."""

    def __init__(self, calls: Counter) -> None:
        super().__init__()
        self.fake, self.calls = FakeTensorMode(allow_non_fake_inputs=True), calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if func is torch.ops.aten.empty.memory_format and kwargs.get("pin_memory"):
            kwargs = kwargs | {"pin_memory": False}  # there is no pinned memory without a GPU
        if func is torch.ops.aten.copy_.default and args[2:] == (True,) and not args[0].is_cuda:
            return args[0].zero_()  # a copy to the host in the background
        if not any(isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == "cuda") for x in leaves):
            return func(*args, **kwargs)
        with self.fake:
            result = func(*args, **kwargs)
        assert all(x.is_cuda for x in tree_leaves(result) if isinstance(x, Tensor)), f"{func} synchronizes with the GPU"
        self.calls[func.overloadpacket.__name__] += 1
        return result


class FakeKernel:
    """Replacement of a Triton kernel that checks its arguments and counts its launches."""

    def __init__(self, kernel, launches: Counter) -> None:
        self.name, self.parameters, self.launches = kernel.__name__, set(kernel.arg_names), launches

    def __getitem__(self, grid):
        def run(**arguments) -> None:
            names = set(arguments) - {"num_warps", "num_stages"}
            assert names == self.parameters, f"wrong arguments of {self.name}: {names ^ self.parameters}"
            assert all(isinstance(size, int) and 0 < size < 2**31 for size in grid), f"grid of {self.name}: {grid}"
            for name, value in arguments.items():
                for x in tree_leaves(value):
                    assert not isinstance(x, Tensor) or x.is_cuda, f"{self.name}: {name} is on the CPU"
            self.launches[self.name] += 1

        return run


class FakeEvent:
    """Replacement of ``torch.cuda.Event``."""

    def __init__(self, enable_timing: bool = False) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1.0


@contextmanager
def fake_gpu(monkeypatch, capability: int = 90) -> Iterator[Counter]:
    """Fake a GPU of a compute capability. Yields how often each kernel was launched and each operation ran on it."""
    _register_device_guard()
    calls = Counter()
    only_lift_cpu_tensors = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # makes torch.tensor create its tensor on the CPU first
    try:
        with monkeypatch.context() as patch, FakeCudaMode(calls):
            _patch_cuda(patch, capability, calls)
            yield calls
    finally:
        torch._C._set_only_lift_cpu_tensors(only_lift_cpu_tensors)
        methods._cached_order.cache_clear()


def _patch_cuda(patch, capability: int, calls: Counter) -> None:
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(torch.cuda, "Event", FakeEvent)
    patch.setattr(torch.cuda, "device_of", lambda x: nullcontext())
    patch.setattr(launching, "is_interpreted", lambda: False)
    patch.setattr(launching, "device_architecture", lambda device: ARCHITECTURES[capability])
    patch.setattr(launching, "_tensor_descriptor", lambda x, rows, columns: x)  # it reads the tensor's address
    for module_name, kernel_names in KERNELS.items():
        module = importlib.import_module(f"dit_sparse.kernels.gpu.{module_name}")
        for name in kernel_names:
            patch.setattr(module, name, FakeKernel(getattr(module, name), calls))


@cache
def _register_device_guard() -> None:
    """Compile and load the device guard once per process. Skips the test if there is no C++ compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        skip_or_fail("requires a C++ compiler (g++ or clang++) on the PATH")
    torch_folder = Path(torch.__file__).parent
    options = ["-shared", "-fPIC", "-std=c++20", f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-lc10"]
    with TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(DEVICE_GUARD)
        subprocess.run([compiler, source, "-o", library, *options], check=True)
        torch.ops.load_library(str(library))
