"""`bench planning`: the measured steps, shares of dense attention, and the command."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from typer.testing import CliRunner

from attention_cases import qkv
from dit_sparse import Grid, Method, Plan, Site
from dit_sparse.cli.main import app
from dit_sparse.eval.bench import planning as bench
from dit_sparse.eval.bench import timing
from dit_sparse.method import shared_memory

GRID = Grid(2, 8, 8)


@dataclass(frozen=True, kw_only=True)
class Recording(Method):
    """Records the calls of plan, with the state it finds."""

    calls: ClassVar[list] = []
    shares: bool = False

    def plan(self, q, k, v, site, memory):
        self.calls.append((site.layer, site.layers, site.step, v is None, memory.get("steps", ())))
        memory["steps"] = (*memory.get("steps", ()), site.step)
        if self.shares:
            shared_memory(memory)["last"] = site.layer
        return Plan.dense(site.grid.tokens, site.block)


@pytest.mark.parametrize("shares, layers", [(False, 1), (True, bench.LAYERS)])
def test_a_later_step_starts_from_the_state_of_the_first(shares, layers):
    planner = bench.Planner(Recording(shares=shares), qkv(GRID.tokens), Site(GRID, 16))
    assert planner.layers == layers
    for _ in range(2):  # repeated measurements find the same state
        Recording.calls.clear()
        planner.first()
        planner.later()
        first = [(layer, layers, bench.FIRST_STEP, True, ()) for layer in range(layers)]
        later = [(layer, layers, bench.LATER_STEP, True, (bench.FIRST_STEP,)) for layer in range(layers)]
        assert Recording.calls == first + later


def test_shares_are_relative_to_dense_attention(monkeypatch):
    def durations(functions, *_):
        for function in functions.values():
            function()
        return {name: [2.0, 4.0] if name == "dense" else [1.0, 1.0] for name in functions}

    monkeypatch.setattr(bench, "interleaved_durations", durations)
    rows = {row["method"]: row for row in bench.measure(["radial", "asa", "rettention"], bench.Problem(GRID), 0)}
    assert rows["asa"]["first"] == rows["asa"]["later"] == 0.375 and rows["asa"]["kind"] == "scorer"
    assert rows["radial"]["static"] and not rows["asa"]["static"]
    assert (rows["asa"]["rounds"], rows["asa"]["dense_seconds"]) == (2, 3.0)


def test_durations_on_a_cpu_are_the_time_that_this_process_computes(monkeypatch):
    clock = iter([1.0, 1.5])
    monkeypatch.setattr(timing, "time", SimpleNamespace(process_time=lambda: next(clock)))
    assert timing.cpu_time_of_call(lambda: None, "cpu") == 0.5


def test_a_method_that_fails_has_its_reason():
    (row,) = bench.measure(["subblock(subblocks=32)"], bench.Problem(GRID, block=16), 0)
    assert row["why_not"].startswith("subblocks must divide the block of 16")


def test_planning_command(tmp_path):
    out, before = tmp_path / "planning.json", torch.get_num_threads()
    arguments = ["--methods", "sparge,svg2", "--grid", "2x8x8", "--heads", "1", "--seconds", "0", "--out", str(out)]
    try:
        result = CliRunner().invoke(app, ["bench", "planning", *arguments])
    finally:
        torch.set_num_threads(before)
    assert result.exit_code == 0, result.output
    stored = json.loads(out.read_text())
    assert [row["method"] for row in stored["rows"]] == ["sparge", "svg2"]
    assert all(row["first"] > 0 and row["later"] > 0 and row["rounds"] >= 3 for row in stored["rows"])
    assert stored["grid"] == "2x8x8" and stored["tokens"] == 128 and "commit" in stored
