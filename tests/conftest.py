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

    monkeypatch.setattr(launching, "preferred", lambda x: x.is_cuda or launching.interpreted())


@pytest.fixture(autouse=True, scope="session")
def small_trials():
    """What "auto" measures is small here, and kept apart from what it measures for its users by its size."""
    from dit_sparse.kernels import calibration as trial

    trial.TIMING_SIZES["cpu"] = (256, 1)
