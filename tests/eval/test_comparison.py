"""The comparison: its rows, what it finds again, its pages, and papers measured again. Its clips: test_takes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dit_sparse import METHODS, Schedule
from dit_sparse.bundled.shapes_wan.judge import held_out_tasks
from dit_sparse.cli.main import app
from dit_sparse.eval.comparison import runner as takes
from dit_sparse.eval.comparison.comparison import Comparison, equal_steps
from dit_sparse.eval.comparison.reproduce import Recipe, beside, recipes

SMALL = ["--steps", "3", "--frames", "2", "--height", "32", "--width", "32"]
CALL = {"num_inference_steps": 3, "num_frames": 2, "height": 32, "width": 32}
PROMPTS = ["a red circle moves left", "a blue square moves up"]


def silent(name):
    return lambda done, steps: None


def compared(out: Path, prompts=PROMPTS, **given) -> Comparison:
    return Comparison(
        ["radial"], prompts, out, **{"densities": (0.4,), "block": 16, "call": CALL, "schedule": Schedule(1)} | given
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    return compared(tmp_path_factory.mktemp("compared"), densities=(0.3, 0.5), seeds=2, quality=True).run(silent)


# --- rows


def test_a_row_for_every_method_and_density_and_what_they_are_compared_with(result):
    names = [row["name"] for row in result["rows"]]
    assert names[:5] == ["dense", "random_blocks 0.3", "radial 0.3", "random_blocks 0.5", "radial 0.5"]
    assert all(row["method"] == "dense" and row["steps"] < 3 for row in result["rows"][5:])
    for row in result["rows"][1:]:
        assert len(row["psnr"]["each"]) == 4 and row["seconds"] > 0 and row["strip"]
        assert row["psnr"]["interval"][0] <= row["psnr"]["mean"] <= row["psnr"]["interval"][1]


def test_the_rows_say_what_was_measured(result):
    rows = {row["name"]: row for row in result["rows"]}
    assert result["grids"] == ["3x8x8"] and result["steps"] == 3
    assert rows["dense"]["psnr"] is None and rows["dense"]["speedup"] == 1 and rows["dense"]["density_run"] == 1
    assert rows["random_blocks 0.3"]["over_random"]["mean"] == 0
    assert 0 < rows["dense"]["quality"]["temporal_flickering"] < 1
    radial = rows["radial 0.5"]
    difference = radial["psnr"]["mean"] - rows["random_blocks 0.5"]["psnr"]["mean"]
    assert radial["over_random"]["mean"] == pytest.approx(difference)
    assert radial["density_hit"] == (abs(radial["density_achieved"] - 0.5) <= 0.01)
    assert 0 < radial["retained"] < 1 and np.shape(radial["mass"]) == (6, 3)
    steps, errors = zip(*radial["latent_error"], strict=True)
    assert steps == (0, 1, 2) and errors[0] == pytest.approx(0, abs=1e-3) and errors[-1] > 0


DENSE = {"name": "dense", "method": "dense", "steps": 20, "attention_seconds": 60.0, "seconds": 100.0}
DENSE |= {"density_asked": None, "density_achieved": None, "density_run": 1.0}


def measured(name: str, asked: float | None, achieved: float, run: float) -> dict:
    method = name.partition(" ")[0]
    return {"name": name, "method": method, "density_asked": asked, "density_achieved": achieved, "density_run": run}


def test_dense_steps_of_the_cost_of_a_row():
    costs = lambda run, **dense: equal_steps({"density_run": run}, DENSE | dense)
    assert costs(0.25 + 0.75 * 0.25) == round(20 * (0.4 + 0.6 * (0.25 + 0.75 * 0.25))) == 13
    assert costs(1.0) == 20 and costs(0.5, attention_seconds=0.0) == 20
    assert costs(0.0, attention_seconds=110.0) == 1 and costs(1.1) == 20


def test_a_dense_row_for_every_cost_that_rows_were_measured_to_have(tmp_path):
    """Rows with a density of their own are counted as well, by what they computed in the whole run."""
    task = Comparison(["window", "radial@own", "svg@0.3"], PROMPTS, tmp_path)
    made = [DENSE]
    turn = task._in_turn(made)
    told = [("random_blocks 0.25", 0.25, 0.26, 0.44), ("window 0.25", 0.25, 0.25, 0.44)]
    told += [("random_blocks 0.3", 0.3, 0.3, 0.48), ("radial", None, 0.6, 0.7), ("svg 0.3", 0.3, 0.3, 0.99)]
    _, rows = next(turn)
    assert [row.name for row in rows] == ["dense", *(name for name, *_ in told)]
    made += [measured(*row) for row in told]
    _, (floor,) = next(turn)
    assert floor.name == "random_blocks 0.6"
    made.append(measured("random_blocks 0.6", 0.6, 0.6, 0.7))
    ((_, dense),) = turn
    assert {row.steps: row.equal_to for row in dense} == {
        13: ("random_blocks 0.25", "window 0.25"),
        14: ("random_blocks 0.3",),
        16: ("radial", "random_blocks 0.6"),
    }


def test_a_row_may_have_a_density_of_its_own(tmp_path):
    task = Comparison(
        ["svg@0.3", "radial@own", "profile:shapes-wan", "window"], PROMPTS, tmp_path, densities=(0.2, 0.1)
    )
    told = [(row.method, row.density) for row in task.rows()]
    assert told[1:5] == [(name, density) for density in (0.1, 0.2) for name in ("random_blocks", "window")]
    assert told[0] == ("dense", None)
    assert told[5:] == [("random_blocks", 0.3), ("svg", 0.3), ("radial", None), ("profile:shapes-wan", None)]
    assert task.rows()[7].processor.settings.method.density is None


def test_random_blocks_are_at_every_density_once(tmp_path):
    task = Comparison(["svg@0.255", "radial@0.4", "svg@0.405", "svg@0.261"], PROMPTS, tmp_path)
    assert [row.density for row in task.rows() if row.method == "random_blocks"] == [0.25, 0.4, 0.261]


@pytest.mark.parametrize(
    "given, words",
    [
        ({"methods": ["dense@0.3"]}, "no density of its own"),
        ({"methods": ["dense@own"]}, "no density of its own"),
        ({"methods": ["svg@2"]}, "density is the fraction"),
        ({"densities": [0.00001]}, "density is the fraction"),
        ({"prompts": ["a", "b", "a"]}, "'a' is given twice"),
        ({"schedule": Schedule(16), "call": {"num_inference_steps": 16}}, "keeps all 16 steps dense"),
        ({"schedule": Schedule(1.0)}, "keeps all 8 steps dense"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_work(given, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        Comparison(**{"methods": ["radial"], "prompts": PROMPTS, "out": tmp_path / "out"} | given)
    assert not (tmp_path / "out").exists()


def test_densities_that_read_alike_are_one(tmp_path):
    task = Comparison(["radial@0.250002"], PROMPTS, tmp_path, densities=(0.25, 0.2500001))
    assert task.densities == [0.25] and [row.name for row in task.rows()[1:]] == ["random_blocks 0.25", "radial 0.25"]


def test_no_row_is_there_twice(tmp_path):
    task = Comparison(["radial", "radial@0.25", "radial", "dense"], PROMPTS, tmp_path)
    assert [row.name for row in task.rows()] == ["dense", "random_blocks 0.25", "radial 0.25"]


def test_all_methods_and_more(tmp_path):
    task = Comparison(["all", "radial|sink"], PROMPTS, tmp_path)
    assert task.methods == [*METHODS, "radial|sink"]


# --- again


def test_what_is_on_the_shelf_is_not_made_again(tmp_path, monkeypatch):
    first = compared(tmp_path).run(silent)
    monkeypatch.setattr(takes, "generate", lambda *_: pytest.fail("made again"))
    assert compared(tmp_path).run(silent) == first
    with pytest.raises(pytest.fail.Exception):
        compared(tmp_path, prompts=[*PROMPTS, "a green triangle moves up"]).run(silent)


def test_what_is_not_finished_says_so_and_takes_no_place_of_what_is(tmp_path, monkeypatch):
    path, draft = tmp_path / "compare.json", tmp_path / "compare.unfinished.json"
    task = compared(tmp_path, PROMPTS[:1])
    monkeypatch.setattr(takes.ClipRunner, "errors", lambda *_: {})
    monkeypatch.setattr(takes.ClipRunner, "make", lambda *_: None)
    row = measured("radial 0.4", 0.4, 0.4, 0.6) | DENSE | {"psnr": None, "grids": ["1x2x3"], "equal_to": []}

    def summary(wanted, *_):
        if wanted.name == stop:
            raise KeyboardInterrupt
        return row | {"name": wanted.name, "density_asked": wanted.density}

    monkeypatch.setattr("dit_sparse.eval.comparison.comparison.summary", summary)
    stop = "radial 0.4"
    with pytest.raises(KeyboardInterrupt):
        task.run(silent)
    assert json.loads(path.read_text())["finished"] is False and not draft.exists()
    stop = None
    whole = task.run(silent)
    assert whole["finished"] and json.loads(path.read_text()) == json.loads(json.dumps(whole))
    stop = "random_blocks 0.4"
    with pytest.raises(KeyboardInterrupt):
        task.run(silent)
    assert json.loads(path.read_text()) == json.loads(json.dumps(whole))
    assert len(json.loads(draft.read_text())["rows"]) == 1
    stop = None
    task.run(silent)
    assert not draft.exists()


def test_killed_and_called_again_it_ends_with_the_same_table(tmp_path):
    command = [sys.executable, "-m", "dit_sparse.cli", "compare", "--methods", "radial", "--prompts", "2"]
    command += ["--density", "0.4", "--block", "16", *SMALL, "--dense-steps", "1", "--executor", "gather"]
    command += ["--out", str(tmp_path / "killed")]
    clips = tmp_path / "killed" / "clips"
    for kill in (1, 2):
        run = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while len(list(clips.glob("[!.]*.npz"))) < 2 * kill and run.poll() is None:
            time.sleep(0.02)
        run.send_signal(signal.SIGKILL)
        run.wait()
    before = {path: path.stat().st_mtime_ns for path in clips.glob("[!.]*.npz")}
    prompts = [task.text for task in held_out_tasks(2)]
    killed, straight = (
        compared(tmp_path / out, prompts, executor="gather").run(silent) for out in ("killed", "straight")
    )
    assert len(before) >= 4 and all(path.stat().st_mtime_ns == when for path, when in before.items())
    for a, b in zip(killed["rows"][:3], straight["rows"][:3], strict=True):
        for key in ("name", "density_achieved", "density_run", "psnr", "ssim", "ms_ssim", "mass", "latent_error"):
            assert a[key] == b[key], key


# --- papers


@pytest.mark.parametrize("name", recipes())
def test_recipes_are_comparisons_that_could_run(name, tmp_path):
    recipe = Recipe.load(name)
    rows = {row.given: row for row in recipe.comparison(PROMPTS, tmp_path).rows()}
    assert {published.row for published in recipe.published} <= set(rows)
    assert "arXiv:" in recipe.source and recipe.hardware


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
[[published]]
row = "window@0.5"
psnr = 20.0
speedup = 2.0
"""


def test_a_paper_measured_again(tmp_path):
    (tmp_path / "tiny.toml").write_text(RECIPE)
    run = CliRunner().invoke(
        app, ["reproduce", str(tmp_path / "tiny.toml"), "--prompts", "1", "--out", str(tmp_path / "out")]
    )
    assert run.exit_code == 0, run.output
    assert "window@0.5" in run.output and "20 / " in run.output
    result = json.loads((tmp_path / "out" / "compare.json").read_text())
    (row,) = beside(Recipe.load(tmp_path / "tiny.toml"), result)
    assert row["psnr"][0] == 20 and row["psnr"][1] > 5 and row["lpips"][0] is None and row["speedup"][1] > 0


@pytest.mark.parametrize(
    "change, words",
    [
        (("density = 0.4", "density = 4"), "density"),
        (("psnr = 20.0", "psnt = 20.0"), "psnt"),
        (("title =", "title"), "no TOML file"),
        (("window@0.5", "nope@0.5"), "no method 'nope'"),
        (("window@0.5", "window@half"), "METHOD@DENSITY"),
        (("dense_steps = 1", "dense_stops = 1"), "dense_stops"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_said(tmp_path, change, words):
    (tmp_path / "tiny.toml").write_text(RECIPE.replace(*change))
    run = CliRunner().invoke(app, ["reproduce", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "out")])
    assert run.exit_code == 2 and words in run.output.replace("\n", " "), run.output


def test_recipes_are_listed():
    run = CliRunner().invoke(app, ["reproduce"])
    assert run.exit_code == 0 and all(name in run.output for name in recipes())
    assert CliRunner().invoke(app, ["reproduce", "nope"]).exit_code == 2


@pytest.mark.parametrize(
    "given, words",
    [
        (["--density", "a"], "numbers separated by commas"),
        (["--density", ""], "no density"),
        (["--density", "0.2,3"], "density is the fraction"),
        (["--methods", "svg@x"], "METHOD@DENSITY"),
    ],
)
def test_bad_input_is_one_sentence(given, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(app, ["compare", *given])
    assert run.exit_code == 2 and words in run.output.replace("\n", " "), run.output
    assert os.listdir(tmp_path) == []
