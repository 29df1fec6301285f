"""The command ``dit-sparse profile``, and bad input to it and to ``dit-sparse compare``."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from dit_sparse import Profile
from dit_sparse.cli.main import app
from dit_sparse.profiling import candidates

SMALL_VIDEO = ["--frames", "3", "--height", "32", "--width", "32", "--steps", "4"]


@pytest.mark.parametrize("spread", [(), ("--spread", "0.5,1,1.5")], ids=["one density", "spread"])
def test_profile_is_written_and_checked(tmp_path, spread):
    out = tmp_path / "mine.json"
    command = ["profile", "shapes-wan-i2v", "--prompts", "1", *SMALL_VIDEO]
    search = ["--candidates", "radial,svg.temporal", "--target-density", "0.5", "--block", "16", "--out", str(out)]
    result = CliRunner().invoke(app, [*command, *search, *spread])
    assert result.exit_code == 0, result.output
    profile = Profile.load(out)
    assert profile.measured["density"] == pytest.approx(0.5, abs=0.01)
    assert len(profile.layers) == len(profile.measured["errors"]) == 6
    assert {"device", "versions", "commit", "grids", "prompts", "candidates"} <= set(profile.measured)
    assert out.with_suffix(".png").stat().st_size > 1000
    check = CliRunner().invoke(app, [*command, "--check", str(out)])
    assert check.exit_code == 0 and "relative error" in check.output, check.output


def test_compositions_can_be_candidates(tmp_path):
    out = tmp_path / "mine.json"
    search = ["--candidates", "radial|sink,pooled(svg),cached(xattention)", "--target-density", "0.3", "--block", "16"]
    command = ["profile", "shapes-wan-i2v", "--prompts", "1", *search, "--out", str(out), *SMALL_VIDEO]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert Profile.load(out).measured["block"] == 16


@pytest.mark.slow
def test_one_profile_of_spans_serves_several_lengths(tmp_path, monkeypatch):
    """The density is met at each measured length, and heads have different spans."""
    monkeypatch.setattr(candidates, "MOA_ALPHAS", (0.5, 2.0))
    out = tmp_path / "spans.json"
    search = ["--candidates", "moa", "--target-density", "0.6", "--block", "16", "--lengths", "3,6", "--out", str(out)]
    result = CliRunner().invoke(app, ["profile", "shapes-wan-i2v", "--prompts", "1", *search, *SMALL_VIDEO])
    assert result.exit_code == 0, result.output
    profile = Profile.load(out)
    densities = profile.measured["densities"]
    assert len(profile.measured["grids"]) == len(densities) == 2 and max(densities) <= 0.6001
    assert max(densities) > 0.5 and len(profile.methods) > 1, "most of the density is spent"
    assert all(entry.method.startswith(("moa", "dense")) for entry in profile.methods.values())


@pytest.mark.parametrize(
    "command, words",
    [
        (["compare", "--methods", "nope"], "no method 'nope'"),
        (["compare", "--methods", "profile:nope"], "no profile 'nope'"),
        (["compare", "--density", "2"], "density must be in"),
        (["compare", "--prompts", "nowhere.txt"], "cannot read nowhere.txt"),
        (["compare", "--prompts", "a long sentence " * 30], "a number from 1 to 60"),
        (["compare", "--prompts", "61"], "a number from 1 to 60"),
        (["compare", "--prompts", "²"], "a number from 1 to 60"),
        (["compare", "--methods", "profile:" + "a" * 300], "no profile 'aaa"),
        (["compare", "--methods", "window|sink"], "different token orders"),
        (["compare", "--methods", "cached"], "write cached(METHOD)"),
        (["compare", "--dense-steps", "nan"], "[0.0, 1.0], got nan"),
        (["compare", "--dense-steps", "some"], "a count such as 3"),
        (["profile", "shapes-wan-i2v", "--target-density", "2"], "in (0, 1), got 2.0"),
        (
            ["profile", "shapes-wan-i2v", "--target-density", "0.2", "--max-error", "0.1"],
            "either a target density or a maximum error",
        ),
        (["profile", "shapes-wan-i2v", "--candidates", "nope"], "no method 'nope'"),
        (["profile", "shapes-wan-i2v", "--spread", "wide"], "--spread must be numbers separated by commas"),
        (["profile", "shapes-wan-i2v", "--spread", "4"], "spread must be positive multiples of the density"),
        (["profile", "shapes-wan-i2v", "--spread", "-1,1"], "spread must be positive multiples of the density"),
        (["profile", "shapes-wan-i2v", "--lengths", "9.5"], "num_frames must be in [1, 100000], got 9.5"),
        (["profile", "shapes-wan-i2v", "--lengths", "long"], "--lengths must be numbers separated by commas"),
        (["profile", "shapes-wan-i2v", "--spread", "2"], "cannot meet the target"),
        (["profile", "shapes-wan-i2v", "--out", "profile.txt"], "must end in .json"),
        (["profile", "shapes-wan-i2v", "--dense-steps", "1.0"], "all 16 steps dense"),
        (["profile", "shapes-wan-i2v", "--check", "nope"], "no profile 'nope'"),
        (["profile", "shapes-wan-i2v", "--check", "wan2.1-14b"], "was not measured"),
    ],
)
def test_bad_input_gives_one_sentence(command, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and words in result.output.replace("\n", " "), result.output
    assert not any(tmp_path.rglob("*.json"))
