"""Settings of all tests. Without a GPU, Triton kernels run in Triton's interpreter."""

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # there are as many workers as cores
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # starting a pool takes longer than the small graphs here
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it on import


@pytest.fixture
def triton_preferred(monkeypatch):
    """Use the Triton implementation of functions that have one, also in the interpreter."""
    from dit_sparse.kernels.gpu import launching

    monkeypatch.setattr(launching, "prefers_triton", lambda x: x.is_cuda or launching.is_interpreted())


@pytest.fixture(autouse=True, scope="session")
def small_timing_problems():
    """Measure cost models on small problems. Their size is part of the cache key, so they do not replace a user's."""
    from dit_sparse.kernels import calibration

    calibration.TIMING_SIZES["cpu"] = (256, 1)
