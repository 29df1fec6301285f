"""The commands that judge: `eval video`, `eval export`, `eval attention`, `bench scaling`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from dit_sparse.cli import app
from dit_sparse.eval.clips import Shelf, Take
from dit_sparse.eval.files import read_video, save_video

SMALL = ["--steps", "3", "--frames", "2", "--height", "32", "--width", "32"]


def run(*command: object):
    return CliRunner().invoke(app, [str(part) for part in command])


def clip(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, 190, (3, 24, 32, 3), dtype=np.uint8)


@pytest.fixture
def videos(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        save_video(tmp_path / f"{name}.mp4", clip(seed), fps=8)
    return tmp_path


def test_a_video_is_judged_by_itself_and_against_another(videos):
    judged = run("eval", "video", videos / "a.mp4", "--reference", videos / "b.mp4", "--json", videos / "x.json")
    assert judged.exit_code == 0, judged.output
    found = json.loads((videos / "x.json").read_text())
    assert 0 < found["quality"]["temporal_flickering"] < 1 and 5 < found["fidelity"]["psnr"]["pooled"] < 30
    assert "temporal_flickering" in judged.output and "ms_ssim" in judged.output
    same = run("eval", "video", videos / "a.mp4", "--reference", videos / "a.mp4", "--json", videos / "y.json")
    assert same.exit_code == 0 and json.loads((videos / "y.json").read_text())["fidelity"]["psnr"]["pooled"] == "inf"


def test_a_video_is_read_as_it_was_written(videos):
    frames, fps = read_video(videos / "a.mp4")
    assert frames.shape[0] == 3 and frames.dtype == np.uint8 and fps == 8


def test_clips_of_a_row_are_written_for_vbench(tmp_path):
    shelf = Shelf(tmp_path / "clips")
    for seed in (0, 1):
        for row in ("dense", "radial 0.25"):
            shelf.put(row, {"seed": seed}, Take(clip(seed), {"row": row, "prompt": "a red circle", "seed": seed}))
    written = run("eval", "export", tmp_path, "--row", "radial 0.25", "--out", tmp_path / "vbench")
    assert written.exit_code == 0, written.output
    names = sorted(path.name for path in (tmp_path / "vbench" / "videos").iterdir())
    assert names == ["a red circle-0.mp4", "a red circle-1.mp4"]


def test_attention_beside_the_best_mask(tmp_path):
    looked = run("eval", "attention", "--methods", "random_blocks,subblock", "--block", 16, "--out", tmp_path, *SMALL)
    assert looked.exit_code == 0, looked.output
    rows = {row["method"]: row for row in json.loads((tmp_path / "analysis.json").read_text())["rows"]}
    assert rows["random_blocks"]["efficiency"] < rows["subblock"]["efficiency"] <= 1
    assert {path.name for path in tmp_path.iterdir()} == {"analysis.json", "00.png", "01.png"}


def test_scaling_writes_exponents_and_pictures(tmp_path):
    given = ["--methods", "dense,radial", "--frames", "4,8,16", "--frame", "8x10", "--out", tmp_path / "s.json"]
    measured = run("bench", "scaling", *given)
    assert measured.exit_code == 0, measured.output
    found = json.loads((tmp_path / "s.json").read_text())["exponents"]
    assert found["dense"]["own"]["exponent"] == pytest.approx(2) and found["radial"]["own"]["exponent"] < 2
    assert {path.name for path in tmp_path.iterdir()} == {"s.json", "s-own.png", "s-fixed.png"}


@pytest.mark.parametrize(
    "command, words",
    [
        (["eval", "video", "nowhere.mp4"], "cannot read a video from nowhere.mp4"),
        (["eval", "export", "nowhere"], "no folder of dit-sparse compare"),
        (["eval", "attention", "--methods", "nope"], "no method 'nope'"),
        (["eval", "attention", "--density", "x"], "fractions separated by commas"),
        (["bench", "scaling", "--frames", "8,a"], "lengths separated by commas"),
        (["bench", "scaling", "--frames", "16,8"], "ascending"),
        (["bench", "scaling", "--frame", "8"], "cannot read the grid"),
    ],
)
def test_bad_input_is_one_sentence(command, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = run(*command)
    assert refused.exit_code == 2 and words in refused.output.replace("\n", " "), refused.output
    assert not list(tmp_path.iterdir())


def test_a_row_that_is_not_there_is_named_with_those_that_are(tmp_path):
    Shelf(tmp_path / "clips").put("dense", {}, Take(clip(0), {"row": "dense", "prompt": "p", "seed": 0}))
    refused = run("eval", "export", tmp_path, "--row", "svg 0.1", "--out", tmp_path / "out")
    assert refused.exit_code == 2 and "there are dense" in refused.output and not (tmp_path / "out").exists()
