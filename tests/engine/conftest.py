"""Fixtures: tiny stock pipelines, costs of executors, and a fresh compiler."""

import pytest
import torch

import tiny_pipelines as tiny
from dit_sparse.kernels.calibration import CostModel
from sparse_pipelines import cached_pipeline


@pytest.fixture(params=tiny.ALL)
def stock(request) -> tiny.Tiny:
    return cached_pipeline(request.param)


@pytest.fixture
def wan() -> tiny.Tiny:
    return cached_pipeline("wan")


@pytest.fixture
def executor_costs(monkeypatch) -> dict[str, CostModel]:
    """Costs by executor, "dense" for SDPA; every other executor has the cost of "default"."""
    costs = {"dense": CostModel(100.0, 0.0, 1e-9), "default": CostModel(0.0, 0.0, 1e-9)}
    monkeypatch.setattr("dit_sparse.kernels.pick.cost_model", lambda name, _: costs.get(name, costs["default"]))
    return costs


@pytest.fixture
def fresh_compiler():
    yield
    torch.compiler.reset()
