"""`bench transformer`: sizes of the published models, and timed forward passes."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import torch
from typer.testing import CliRunner

from dit_sparse.cli.main import app
from dit_sparse.eval.bench import transformer as bench

LABELS = {  # of stand-ins on a CPU
    "wan2.1-1.3b": "1/30 of wan2.1-1.3b, CPU",
    "wan2.1-14b": "1/40 of wan2.1-14b, CPU",
    "hunyuan-video": "1/30 of hunyuan-video, CPU",
    "cogvideox1.5-5b": "1/42 of cogvideox1.5-5b, CPU",
}


@pytest.mark.parametrize(
    "name, billions", [("wan2.1-1.3b", 1.42), ("wan2.1-14b", 14.3), ("hunyuan-video", 12.8), ("cogvideox1.5-5b", 5.57)]
)
def test_models_have_the_published_number_of_parameters(name, billions):
    model = bench.MODELS[name]
    getattr(diffusers, model.class_name)  # import before the default device changes
    with torch.device("meta"):
        parameters = sum(p.numel() for p in model.make(model.full).parameters())
    assert parameters / 1e9 == pytest.approx(billions, rel=0.02)
    assert model.label(name, model.full) == name
    assert model.full.grid.tokens in (75_600, 118_800 + 256, 44_880 + 226)


@pytest.mark.parametrize("name", bench.MODELS)
def test_small_models_keep_the_ratio_of_tokens_to_channels(name):
    full, small = bench.MODELS[name].full, bench.MODELS[name].small
    assert small.grid.tokens / small.heads == pytest.approx(full.grid.tokens / full.heads, rel=0.01)
    assert small.text / small.heads == pytest.approx(full.text / full.heads, rel=0.03)


@pytest.mark.parametrize("name", bench.MODELS)
def test_forward_passes_are_timed_dense_and_sparse(name, monkeypatch):
    """One layer of the published class and inputs, with few tokens."""
    published = bench.MODELS[name]
    grid = replace(published.small.grid, frames=2, height=4, width=6)
    small = replace(published.small, heads=1, grid=grid)
    monkeypatch.setitem(bench.MODELS, name, replace(published, small=small))
    rows = list(bench.measure_model(name, "cpu", (0.5, 0.3), "random_blocks", rounds=1))
    assert [row["density_asked"] for row in rows] == [0.5, 0.3]
    for row in rows:
        assert row["model"] == LABELS[name] and row["executor"] and 0 < row["density"] <= 1 and row["heads"] == 1
        assert row["speedup"] == pytest.approx(row["seconds_dense"] / row["seconds_sparse"])


@pytest.mark.slow
def test_compiled_blocks_are_timed(monkeypatch):
    published = bench.MODELS["wan2.1-1.3b"]
    small = replace(published.small, heads=1, grid=replace(published.small.grid, frames=2, height=4, width=6))
    monkeypatch.setitem(bench.MODELS, "wan2.1-1.3b", replace(published, small=small))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    (row,) = bench.measure_model("wan2.1-1.3b", "cpu", (0.5,), "random_blocks", rounds=1, compiled=True)
    assert row["compiled"] and row["seconds_dense"] > 0 and torch._dynamo.utils.counters["graph_break"] == {}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "sora"], "there is no model 'sora'; there are wan2.1-1.3b, wan2.1-14b"),
        (["--density", "0"], "density must be in (0, 1], got 0"),
        (["--method", "magic"], "magic"),
    ],
)
def test_invalid_options_are_refused(options, message, tmp_path):
    file = tmp_path / "transformer.json"
    result = CliRunner().invoke(app, ["bench", "transformer", *options, "--out", str(file)])
    assert result.exit_code == 2 and message in result.output and not file.exists()
