"""The way to the kernels on a GPU, without one: devices, types, launches, and that nobody waits for a number."""

from __future__ import annotations

import pytest
import torch

from dit_sparse import METHODS, ClusterPlan, Grid, Site
from dit_sparse.kernels import block_ragged, block_sparse
from dit_sparse.method import Computed
from dit_sparse.methods import method
from pretended import pretended_gpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and it is tested itself")

NAMES = [name for name in METHODS if name != "dense"] + ["radial|sink", "rettention(adaspa)", "cached(svg2)"]


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize("grid", [Grid(5, 16, 16), Grid(5, 16, 16, after=30)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_method_plans_and_attends_without_waiting(name, grid, monkeypatch):
    chosen, memory = method(name, density=0.25), {}
    with pretended_gpu(monkeypatch) as launched:
        q, k, v = (on_gpu(2, 4, grid.tokens, 64) for _ in range(3))
        for step in (3, 4):
            site = Site(grid, 64, layer=1, layers=4, step=step, steps=10)
            plan = chosen.plan(q, k, site, memory)
            executor = block_ragged if isinstance(plan, ClusterPlan) else block_sparse
            dense = lambda plan=plan, attend=executor.attend: attend(q, k, v, plan.whole())
            done = Computed(q, k, v, plan, None, *executor.attend(q, k, v, plan), dense)
            out, lse = chosen.correct(done, site, memory)
        assert out.is_cuda and out.shape == q.shape and out.dtype == q.dtype
        assert lse is None or (lse.is_cuda and lse.shape == q.shape[:3] and lse.dtype == torch.float32)
    assert launched["forward"] >= 2
