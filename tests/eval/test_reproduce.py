"""Papers measured again: recipes that mean single rows, and published numbers beside measured ones."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from dit_sparse.cli.main import app
from dit_sparse.eval.comparison.reproduce import Recipe, beside, recipes

RECIPE = """
title = "tiny"
source = "arXiv:0000.00000"
hardware = "none"
model = "shapes-wan"
density = 0.4
[call]
num_inference_steps = 3
num_frames = 2
height = 32
width = 32
[schedule]
dense_steps = 1
"""


def recipe(tmp_path, *rows: str, change=("", "")) -> str:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.replace(*change) + "".join(f'[[published]]\nrow = "{row}"\nspeedup = 2.0\n' for row in rows))
    return str(path)


def measured(method: str, density: float | None, psnr: float | None, steps: int = 3) -> dict:
    told = {"density_achieved": density, "lpips": {"unavailable": "no weights"}, "speedup": 1.5, "steps": steps}
    spread = None if psnr is None else {"mean": psnr}
    return {"method": method, "density_asked": density, "psnr": spread, "ssim": spread} | told


def test_rows_are_found_by_method_and_density(tmp_path):
    asked = ("radial@0.40", "random_blocks@0.4", "dense", "window@own", "window", "profile:shapes-wan")
    told = Recipe.load(recipe(tmp_path, *asked))
    rows = [measured("dense", None, None), measured("random_blocks", 0.4, 11), measured("radial", 0.4, 12)]
    rows += [measured("window", None, 13), measured("window", 0.4, 14), measured("profile:shapes-wan", None, 15)]
    found = list(beside(told, {"steps": 3, "rows": [*rows, measured("dense", None, 9, steps=2)]}))
    assert [row["row"] for row in found] == list(asked)
    assert [row["psnr"][1] for row in found] == [12, 11, None, 13, 14, 15]
    assert [row["density"][0] for row in found] == [0.4, 0.4, None, None, 0.4, None]
    assert all(row["speedup"] == (2.0, 1.5) and row["lpips"] == (None, None) for row in found)


@pytest.mark.parametrize("name", recipes())
def test_all_rows_of_a_recipe_are_rows_of_its_comparison(name, tmp_path):
    told = Recipe.load(name)
    compared = {(row.method, row.density) for row in told.comparison(["a cat"], tmp_path).rows()}
    assert {one.wanted(told.density) for one in told.published} <= compared


@pytest.mark.parametrize(
    "rows, change, words",
    [
        (["radial@0.4", "radial@0.40"], ("", ""), "'radial@0.4' and 'radial@0.40' are one row"),
        (["radial", "radial@0.4"], ("", ""), "'radial' and 'radial@0.4' are one row"),
        (["all"], ("", ""), "'all' is no single row"),
        (["dense@own"], ("", ""), "'dense@own' is no single row"),
        (["profile:shapes-wan@0.3"], ("", ""), "is no single row"),
        (["radial@x"], ("", ""), "METHOD@DENSITY"),
        (["radial"], ("num_frames", "frames"), "takes no 'frames' under [call]; it takes"),
        (["radial"], ("num_frames = 2", 'prompt = "a cat"'), "takes no 'prompt' under [call]"),
        (["radial"], ('"shapes-wan"', '"./nowhere"'), "cannot load the model ./nowhere"),
    ],
)
def test_what_could_not_be_measured_is_refused_before_the_work(rows, change, words, tmp_path, monkeypatch):
    monkeypatch.setattr("dit_sparse.eval.comparison.comparison.Comparison.run", lambda *_: pytest.fail("work began"))
    told = recipe(tmp_path, *rows, change=change)
    run = CliRunner().invoke(app, ["reproduce", told, "--prompts", "1", "--out", str(tmp_path / "out")])
    said = run.output.replace("\n", " ")
    assert run.exit_code == 2 and words in said, run.output
    assert "Value error" not in said
