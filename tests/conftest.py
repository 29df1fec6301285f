"""Before anything is imported: without a GPU the Triton kernels run in Triton's interpreter."""

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # as many workers as there are cores: more threads would wait for each other
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton decides when it is imported


@pytest.fixture
def triton_preferred(monkeypatch):
    """Functions that have a plain form and a Triton form take Triton's, in the interpreter too."""
    from dit_sparse.kernels.gpu import launching

    monkeypatch.setattr(launching, "prefers_triton", lambda x: x.is_cuda or launching.is_interpreted())


@pytest.fixture(autouse=True, scope="session")
def small_timing_problems():
    """Measure cost models on small problems. Their size is part of the cache key, so they do not replace a user's."""
    from dit_sparse.kernels import calibration

    calibration.TIMING_SIZES["cpu"] = (256, 1)
