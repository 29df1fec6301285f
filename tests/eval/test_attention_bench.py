"""`bench attention`: rows, correctness checks, timing, and the command."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from attention_cases import qkv
from dit_sparse import Grid, Plan
from dit_sparse.cli.main import app
from dit_sparse.eval.bench import attention as bench
from dit_sparse.eval.bench import timing
from dit_sparse.kernels.executors import gather

SMALL = Grid(2, 8, 9)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def small_case(pattern: str = "radial") -> bench.Case:
    return bench.cases(DEVICE, [SMALL], [64], [0.5], [pattern])[0]


@pytest.mark.parametrize("pattern", bench.PATTERNS)
def test_every_executor_has_a_row_with_measurements_or_a_reason(pattern):
    case = small_case(pattern)
    rows = list(bench.measure_case(case, ["gather", "block_ragged", "block_sparse"], 0.0))
    assert {row["executor"] for row in rows} == {"gather", "block_ragged", "block_sparse"}
    for row in rows:
        assert (row["tokens"], row["head_dim"], row["pattern"]) == (144, 64, pattern)
        if "why_not" in row:
            assert row["executor"] == ("block_sparse" if pattern == "clusters" else "block_ragged")
            continue
        assert 0 < row["density"] <= 1 and row["seconds"] > 0
        assert row["speedup"] == pytest.approx(row["dense_seconds"] / row["seconds"])
        assert row["cost_per_block"] == pytest.approx(1 / (row["density"] * row["speedup"]), rel=1e-3)
        pairs = row["density"] * 144**2
        assert row["tflops"] == pytest.approx(4 * pairs * case.heads * 64 / row["seconds"] / 1e12, rel=1e-3)


def test_wrong_output_raises():
    q, k, v = qkv(144, dim=64)
    plan = Plan.dense(144, 64)
    out, _ = gather.attend(q, k, v, plan)
    bench.check_output("gather", out, q, k, v, plan)
    with pytest.raises(RuntimeError, match="'gather' is wrong on this device: relative error"):
        bench.check_output("gather", 1.01 * out, q, k, v, plan)
    with pytest.raises(RuntimeError, match="is wrong on this device"):
        bench.check_output("gather", out * torch.nan, q, k, v, plan)


def test_executors_are_checked_before_timing(monkeypatch):
    events, timer = [], bench.interleaved_medians
    monkeypatch.setattr(bench, "check_output", lambda name, *_: events.append(name))
    monkeypatch.setattr(bench, "interleaved_medians", lambda *args: events.append("timing") or timer(*args))
    list(bench.measure_case(small_case(), ["gather", "reference"], 0.0))
    assert events == ["gather", "reference", "timing"]


def test_speedup_is_the_ratio_of_medians_to_the_fastest_dense(monkeypatch):
    seconds = {"slow": [9.0, 9.0, 9.0], "fast": [1.0, 4.0, 2.0], "gather": [1.0, 8.0, 1.0]}
    returns = lambda name: lambda: name
    monkeypatch.setattr(timing, "MAX_ROUNDS", 3)
    monkeypatch.setattr(bench, "dense_attention", lambda *_: {name: returns(name) for name in ("slow", "fast")})
    times = {name: iter(values) for name, values in seconds.items()}
    monkeypatch.setattr(timing, "time_call", lambda run, _: next(times[run() if isinstance(run(), str) else "gather"]))
    (row,) = bench.measure_case(small_case(), ["gather"], 0.0)
    assert (row["dense"], row["dense_seconds"], row["seconds"], row["speedup"]) == ("fast", 2.0, 1.0, 2.0)


def test_timed_functions_take_turns(monkeypatch):
    monkeypatch.setattr(timing, "MAX_ROUNDS", 3)
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    medians = timing.interleaved_medians(functions, 0.0, "cpu")
    assert calls == list("ab" * 4) and set(medians) == {"a", "b"}


def test_command_writes_json_and_prints_a_table(tmp_path):
    file = tmp_path / "folder" / "attention.json"
    shape = ["--grid", "2x8x9", "--head-dim", "64", "--density", "0.5", "--heads", "1", "--seconds", "0.1"]
    result = CliRunner().invoke(
        app, ["bench", "attention", "--executor", "gather", "--pattern", "radial", *shape, "--out", str(file)]
    )
    assert result.exit_code == 0, result.output
    assert "144 x 64" in result.output and "gather" in result.output
    stored = json.loads(file.read_text())
    assert {"device", "versions", "commit", "note"} < set(stored)
    assert all(row["executor"] == "gather" and row["heads"] == 1 for row in stored["rows"])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--executor", "magic"], "'magic'; there are reference, gather"),
        (["--pattern", "plaid"], "'plaid'; there are radial, random_blocks, clusters"),
        (["--grid", "8"], "cannot read the grid '8'"),
        (["--density", "2"], "density must be in (0, 1], got 2"),
    ],
)
def test_invalid_options_are_refused(options, message, tmp_path):
    file = tmp_path / "attention.json"
    result = CliRunner().invoke(app, ["bench", "attention", *options, "--out", str(file)])
    assert result.exit_code == 2 and message in result.output and not file.exists()
