"""The commands, as a user types them: what they print, what they refuse, what they leave behind."""

import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from dit_sparse import METHODS
from dit_sparse.cli.main import app, count_or_fraction
from dit_sparse.kernels.executors import EXECUTORS


def call(*arguments: str):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize("command", ["demo", "generate", "methods", "show", "doctor"])
def test_every_command_has_help_with_an_example(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"Example: dit-sparse {command}" in result.output


def test_methods_as_table_and_as_json():
    assert all(name in call("methods").output for name in METHODS)
    rows = json.loads(call("methods", "--json").output)
    assert [row["name"] for row in rows] == list(METHODS)
    assert all(row["source"].startswith("https://") and row["summary"] for row in rows)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("svg2", "pbs")])
def test_show_draws_in_the_terminal_and_to_a_file(method, tmp_path):
    result = call(
        "show", method, "--grid", "226+3x9x10", "--density", "0.5", "--block", "32", "--png", tmp_path / "m.png"
    )
    assert result.exit_code == 0
    assert "226 text + 3x9x10" in result.output
    assert (tmp_path / "m.png").stat().st_size > 1000


def test_doctor_tells_every_executor_s_verdict():
    found = json.loads(call("doctor", "--json", "--quick").output)
    assert set(found["executors"]) == set(EXECUTORS)
    assert found["executors"]["gather"] == "ok"
    assert re.search("not tried|a C\\+\\+ compiler", found["executors"]["flex"]), "it would compile for a while"
    assert found["versions"]["torch"]


BAD = {
    "unknown method": (["show", "nonsense"], "no method 'nonsense'"),
    "clusters of nothing": (["show", "svg2"], "svg2 clusters tokens by what they hold"),
    "density 0": (["demo", "--density", "0"], "density must be in"),
    "density 2": (["generate", "x", "--density", "2"], "density must be in"),
    "grid": (["show", "radial", "--grid", "4x4"], "cannot read the grid"),
    "executor": (["demo", "--executor", "warp"], "no executor 'warp'"),
    "dense steps": (["demo", "--dense-steps", "some"], "--dense-steps is a count"),
    "dense steps above 1": (["demo", "--dense-steps", "1.5"], "dense_steps is a count"),
    "one step": (["demo", "--steps", "1"], "at least 2 steps"),
    "not an mp4": (["generate", "x", "--out", "x.gif"], "ends in .mp4"),
    "no frames": (["generate", "x", "--frames", "0"], "must be positive"),
    "no model": (["generate", "x", "--model", "./nowhere"], "no diffusers pipeline"),
    "block": (["show", "radial", "--block", "7"], "block is 16 to 256"),
    "output": (["demo", "--out", "/proc/nothing"], "cannot write into"),
}


@pytest.mark.parametrize(("arguments", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output + result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_damaged_model_folder_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"')
    result = call("generate", "x", "--model", tmp_path, "--out", tmp_path / "x.mp4")
    assert result.exit_code == 2
    assert "cannot load the model" in result.stderr
    assert not (tmp_path / "x.mp4").exists()


def test_generate_writes_a_video(tmp_path):
    size = ("--steps", "2", "--frames", "2", "--height", "64", "--width", "64")
    result = call("generate", "a blue square moves up", *size, "--dense-steps", "1", "--out", tmp_path / "v.mp4")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "v.mp4").stat().st_size > 1000
    assert "radial: density asked 0.250" in result.output


@pytest.mark.parametrize(("text", "value"), [(None, None), ("3", 3), ("0.2", 0.2), ("1.0", 1.0)])
def test_a_count_is_an_integer_and_a_fraction_is_not(text, value):
    found = count_or_fraction(text)
    assert found == value and type(found) is type(value)


def test_the_installed_command_answers():
    answer = subprocess.run([sys.executable, "-m", "dit_sparse.cli", "--help"], capture_output=True, text=True)
    assert answer.returncode == 0 and "generate" in answer.stdout
