"""The tiling sweep: neighbouring launch settings, and how failures are reported."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch

from dit_sparse import Grid
from dit_sparse.eval.bench import tiling_sweep
from dit_sparse.eval.bench.attention import Case
from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.gpu.architectures import ARCHITECTURES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_neighbours_differ_in_one_valid_setting(architecture):
    for (block, _), tiling in ARCHITECTURES[architecture].tilings.items():
        neighbours = tiling_sweep.neighbours(tiling, block)
        assert len(set(neighbours)) == len(neighbours) >= 3
        for one in neighbours:
            assert sum(x != y for x, y in zip(astuple(one), astuple(tiling), strict=True)) == 1
            assert block % one.keys == 0 and one.stages >= 1


def test_failing_tilings_are_reported(monkeypatch):
    dtype = torch.float32 if DEVICE == "cpu" else torch.float16
    case = Case(Grid(2, 8, 9), 1, 64, dtype, "radial", 0.5, DEVICE)
    attend, stages = tiling_sweep.attend, launching.device_architecture(torch.device(DEVICE)).tiling(64, 64).stages

    def failing_attend(q, k, v, plan, machine, tiling):
        if tiling.stages != stages:
            raise RuntimeError("out of resource: shared memory\nmore words")
        out, lse = attend(q, k, v, plan, machine, tiling)
        return (2 * out if tiling.keys == 32 else out), lse

    monkeypatch.setattr(tiling_sweep, "attend", failing_attend)
    current, *others = tiling_sweep.measure_tilings(case, 0.0)
    assert current["usual"] and current["speedup"] == 1 and not any(row["usual"] for row in others)
    assert any("seconds" in row for row in others)
    failures = {row["failed"] for row in others if "failed" in row}
    assert "out of resource: shared memory" in failures
    assert any("is wrong on this device: relative error 1" in failure for failure in failures)
