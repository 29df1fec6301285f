"""`bench attention`: what it measures, and that nothing wrong is timed."""

from __future__ import annotations

import json
from dataclasses import astuple, replace

import diffusers
import pytest
import torch
from typer.testing import CliRunner

from attention_cases import qkv
from dit_sparse import Grid, Plan
from dit_sparse.cli.main import app
from dit_sparse.eval.bench import attention as bench
from dit_sparse.eval.bench import tiling_sweep as tilings
from dit_sparse.eval.bench import transformer as bench_transformer
from dit_sparse.kernels.executors import gather
from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.gpu.architectures import ARCHITECTURES

SMALL = Grid(2, 8, 9)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("pattern", bench.PATTERNS)
def test_a_case_gives_a_row_for_every_executor_or_the_reason_why_not(pattern):
    (case,) = [
        c for c in bench.cases(DEVICE, [SMALL], [64], [0.5], [pattern]) if c.dtype != torch.bfloat16 or DEVICE == "cuda"
    ]
    rows = list(bench.measured(case, ["gather", "block_ragged", "block_sparse"], 0.0))
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


def test_a_wrong_executor_is_never_timed(monkeypatch):
    q, k, v = qkv(144, dim=64)
    plan = Plan.dense(144, 64)
    out, _ = gather.attend(q, k, v, plan)
    bench.check("gather", out, q, k, v, plan)
    with pytest.raises(RuntimeError, match="'gather' is wrong here: relative error"):
        bench.check("gather", 1.01 * out, q, k, v, plan)
    with pytest.raises(RuntimeError, match="is wrong here"):
        bench.check("gather", out * torch.nan, q, k, v, plan)


def test_nothing_is_timed_that_was_not_checked(monkeypatch):
    case = bench.cases(DEVICE, [SMALL], [64], [0.5], ["radial"])[0]
    checked, turns = [], bench.by_turns
    monkeypatch.setattr(bench, "check", lambda name, *_: checked.append(name))
    monkeypatch.setattr(bench, "by_turns", lambda *more: checked.append("clock") or turns(*more))
    list(bench.measured(case, ["gather", "reference"], 0.0))
    assert checked == ["gather", "reference", "clock"]


def test_speeds_are_medians_against_the_best_dense_attention(monkeypatch):
    case = bench.cases(DEVICE, [SMALL], [64], [0.5], ["radial"])[0]
    seconds = {"slow": [9.0, 9.0, 9.0], "fast": [1.0, 4.0, 2.0], "gather": [1.0, 8.0, 1.0]}
    named = lambda name: lambda: name
    monkeypatch.setattr(bench, "ROUNDS", (3, 3))
    monkeypatch.setattr(bench, "dense_attention", lambda *_: {name: named(name) for name in ("slow", "fast")})
    times = {name: iter(values) for name, values in seconds.items()}
    monkeypatch.setattr(bench, "seconds_of", lambda run, _: next(times[run() if isinstance(run(), str) else "gather"]))
    (row,) = bench.measured(case, ["gather"], 0.0)
    assert (row["dense"], row["dense_seconds"], row["seconds"], row["speedup"]) == ("fast", 2.0, 1.0, 2.0)


def test_functions_take_turns(monkeypatch):
    monkeypatch.setattr(bench, "ROUNDS", (3, 3))
    called = []
    medians = bench.by_turns({name: lambda name=name: called.append(name) for name in "ab"}, 0.0, "cpu")
    assert called == list("ab" * 4) and set(medians) == {"a", "b"}


def test_the_command_writes_json_and_a_table(tmp_path):
    file = tmp_path / "found" / "attention.json"
    shape = ["--grid", "2x8x9", "--head-dim", "64", "--density", "0.5", "--heads", "1", "--seconds", "0.1"]
    result = CliRunner().invoke(
        app, ["bench", "attention", "--executor", "gather", "--pattern", "radial", *shape, "--out", str(file)]
    )
    assert result.exit_code == 0, result.output
    assert "144 x 64" in result.output and "gather" in result.output
    found = json.loads(file.read_text())
    assert {"device", "versions", "commit", "note"} < set(found)
    assert all(row["executor"] == "gather" and row["heads"] == 1 for row in found["rows"])


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (["--executor", "magic"], "there is no 'magic'; there are reference, gather"),
        (["--pattern", "plaid"], "there is no 'plaid'; there are radial, random_blocks, clusters"),
        (["--grid", "8"], "cannot read the grid '8'"),
        (["--density", "2"], "above 0 and at most 1, not 2"),
    ],
)
def test_bad_input_is_one_sentence(wrong, sentence, tmp_path):
    file = tmp_path / "attention.json"
    result = CliRunner().invoke(app, ["bench", "attention", *wrong, "--out", str(file)])
    assert result.exit_code == 2 and sentence in result.output and not file.exists()


# --- launch settings


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_neighbours_differ_in_one_setting_that_a_block_can_have(architecture):
    for (block, _), usual in ARCHITECTURES[architecture].tilings.items():
        found = tilings.neighbours(usual, block)
        assert len(set(found)) == len(found) >= 3
        for one in found:
            assert sum(x != y for x, y in zip(astuple(one), astuple(usual), strict=True)) == 1
            assert block % one.keys == 0 and one.stages >= 1


def test_tilings_take_turns_and_one_that_fails_says_so(monkeypatch):
    case = bench.Case(SMALL, 1, 64, torch.float32 if DEVICE == "cpu" else torch.float16, "radial", 0.5, DEVICE)
    right, stages = tilings.attend, launching.machine(torch.device(DEVICE)).tiling(64, 64).stages

    def attend(q, k, v, plan, machine, tiling):
        if tiling.stages != stages:
            raise RuntimeError("out of resource: shared memory\nmore words")
        out, lse = right(q, k, v, plan, machine, tiling)
        return (2 * out if tiling.keys == 32 else out), lse

    monkeypatch.setattr(tilings, "attend", attend)
    usual, *others = tilings.measured(case, 0.0)
    assert usual["usual"] and usual["speedup"] == 1 and not any(row["usual"] for row in others)
    assert any("seconds" in row for row in others)
    failed = {row["failed"] for row in others if "failed" in row}
    assert "out of resource: shared memory" in failed
    assert any("is wrong here: relative error 1" in told for told in failed)


# --- whole transformers


@pytest.mark.parametrize(
    "name, billions", [("wan2.1-1.3b", 1.42), ("wan2.1-14b", 14.3), ("hunyuan-video", 12.8), ("cogvideox1.5-5b", 5.57)]
)
def test_models_are_as_large_as_published(name, billions):
    model = bench_transformer.MODELS[name]
    getattr(diffusers, model.kind)  # imported before the default changes
    with torch.device("meta"):
        found = sum(p.numel() for p in model.make(model.full).parameters()) / 1e9
    assert found == pytest.approx(billions, rel=0.02)
    assert model.full.grid.tokens in (75_600, 118_800 + 256, 44_880 + 226)


@pytest.mark.parametrize("name", bench_transformer.MODELS)
def test_small_models_keep_the_proportion_of_tokens_to_channels(name):
    full, small = bench_transformer.MODELS[name].full, bench_transformer.MODELS[name].small
    assert small.grid.tokens / small.heads == pytest.approx(full.grid.tokens / full.heads, rel=0.01)
    assert small.text / small.heads == pytest.approx(full.text / full.heads, rel=0.03)


@pytest.mark.parametrize("name", bench_transformer.MODELS)
def test_a_forward_pass_is_made_sparse_and_timed(name, monkeypatch):
    """One layer of the published class and inputs, with few tokens."""
    published = bench_transformer.MODELS[name]
    grid = replace(published.small.grid, frames=2, height=4, width=6)
    monkeypatch.setitem(
        bench_transformer.MODELS, name, replace(published, small=replace(published.small, heads=1, grid=grid))
    )
    rows = list(bench_transformer.measured(name, "cpu", (0.5, 0.3), "random_blocks", rounds=1))
    assert [row["density_asked"] for row in rows] == [0.5, 0.3]
    for row in rows:
        assert row["model"] == name and row["executor"] and 0 < row["density"] <= 1 and row["heads"] == 1
        assert row["speedup"] == pytest.approx(row["seconds_dense"] / row["seconds_sparse"])


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (["--model", "sora"], "there is no model 'sora'; there are wan2.1-1.3b, wan2.1-14b"),
        (["--density", "0"], "above 0 and at most 1, not 0"),
        (["--method", "magic"], "magic"),
    ],
)
def test_bad_input_for_transformers_is_one_sentence(wrong, sentence, tmp_path):
    file = tmp_path / "transformer.json"
    result = CliRunner().invoke(app, ["bench", "transformer", *wrong, "--out", str(file)])
    assert result.exit_code == 2 and sentence in result.output and not file.exists()
