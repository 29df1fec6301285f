"""Recipes of published results, and published values next to measured ones."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from dit_sparse.cli.main import app
from dit_sparse.eval.comparison.reproduce import Recipe, published_and_measured, recipes

RECIPE = """
title = "tiny"
source = "arXiv:0000.00000"
hardware = "none"
model = "shapes-wan-i2v"
density = 0.4
[call]
num_inference_steps = 3
num_frames = 2
height = 32
width = 32
[schedule]
dense_steps = 1
"""
ROW = """
[[published]]
row = "window@0.5"
psnr = 20.0
speedup = 2.0
"""


def write_recipe(tmp_path, *rows: str, change=("", "")) -> str:
    path = tmp_path / "tiny.toml"
    published = "".join(f'[[published]]\nrow = "{row}"\nspeedup = 2.0\n' for row in rows) or ROW
    path.write_text((RECIPE + published).replace(*change))
    return str(path)


def result_row(method: str, density: float | None, psnr: float | None, steps: int = 3) -> dict:
    statistics = None if psnr is None else {"mean": psnr}
    return {
        "method": method,
        "density_asked": density,
        "density_achieved": density,
        "psnr": statistics,
        "ssim": statistics,
        "lpips": {"unavailable": "no weights"},
        "speedup": 1.5,
        "steps": steps,
    }


def test_measured_rows_are_found_by_method_and_density(tmp_path):
    published = ("radial@0.40", "random_blocks@0.4", "dense", "window@own", "window", "profile:shapes-wan-i2v")
    recipe = Recipe.load(write_recipe(tmp_path, *published))
    rows = [result_row("dense", None, None), result_row("random_blocks", 0.4, 11), result_row("radial", 0.4, 12)]
    rows += [
        result_row("window", None, 13),
        result_row("window", 0.4, 14),
        result_row("profile:shapes-wan-i2v", None, 15),
    ]
    result = {"steps": 3, "rows": [*rows, result_row("dense", None, 9, steps=2)]}
    table = list(published_and_measured(recipe, result))
    assert [row["row"] for row in table] == list(published)
    assert [row["psnr"][1] for row in table] == [12, 11, None, 13, 14, 15]
    assert [row["density"][0] for row in table] == [0.4, 0.4, None, None, 0.4, None]
    assert all(row["speedup"] == (2.0, 1.5) and row["lpips"] == (None, None) for row in table)


@pytest.mark.parametrize("name", recipes())
def test_published_rows_are_rows_of_the_comparison(name, tmp_path):
    recipe = Recipe.load(name)
    specs = recipe.comparison(["a cat"], tmp_path).specs()
    assert {published.row for published in recipe.published} <= {spec.requested_as for spec in specs}
    rows = {published.method_and_density(recipe.density) for published in recipe.published}
    assert rows <= {(spec.method, spec.density) for spec in specs}
    assert "arXiv:" in recipe.source and recipe.hardware


def test_command_measures_a_recipe(tmp_path):
    recipe = write_recipe(tmp_path)
    run = CliRunner().invoke(app, ["reproduce", recipe, "--prompts", "1", "--out", str(tmp_path / "out")])
    assert run.exit_code == 0, run.output
    assert "window@0.5" in run.output and "20 / " in run.output
    result = json.loads((tmp_path / "out" / "compare.json").read_text())
    (row,) = published_and_measured(Recipe.load(recipe), result)
    assert row["psnr"][0] == 20 and row["psnr"][1] > 5 and row["lpips"][0] is None and row["speedup"][1] > 0


@pytest.mark.parametrize(
    "rows, change, message",
    [
        ([], ("density = 0.4", "density = 4"), "density"),
        ([], ("psnr = 20.0", "psnt = 20.0"), "psnt"),
        ([], ("title =", "title"), "not a TOML file"),
        ([], ("window@0.5", "nope@0.5"), "no method 'nope'"),
        ([], ("dense_steps = 1", "dense_stops = 1"), "dense_stops"),
        (["radial@0.4", "radial@0.40"], ("", ""), "'radial@0.4' and 'radial@0.40' are one row"),
        (["radial", "radial@0.4"], ("", ""), "'radial' and 'radial@0.4' are one row"),
        (["all"], ("", ""), "'all' is not a single row"),
        (["dense@own"], ("", ""), "'dense@own': dense attention computes all pairs"),
        (["profile:shapes-wan-i2v@0.3"], ("", ""), "shapes-wan-i2v@0.3"),
        (["radial@x"], ("", ""), "METHOD@DENSITY"),
        (["radial"], ("num_frames", "frames"), "takes no 'frames' under [call]; it takes"),
        (["radial"], ("num_frames = 2", 'prompt = "a cat"'), "takes no 'prompt' under [call]"),
        (["radial"], ('"shapes-wan-i2v"', '"./nowhere"'), "cannot load the model ./nowhere"),
    ],
)
def test_invalid_recipes_are_refused_before_any_work(rows, change, message, tmp_path, monkeypatch):
    monkeypatch.setattr("dit_sparse.eval.comparison.comparison.Comparison.run", lambda *_: pytest.fail("work began"))
    recipe = write_recipe(tmp_path, *rows, change=change)
    run = CliRunner().invoke(app, ["reproduce", recipe, "--prompts", "1", "--out", str(tmp_path / "out")])
    output = run.output.replace("\n", " ")
    assert run.exit_code == 2 and message in output, run.output
    assert "Value error" not in output


def test_recipes_are_listed():
    run = CliRunner().invoke(app, ["reproduce"])
    assert run.exit_code == 0 and all(name in run.output for name in recipes())
    assert CliRunner().invoke(app, ["reproduce", "nope"]).exit_code == 2
