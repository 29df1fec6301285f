"""Comparisons: rows and baselines, results, resuming, and the command."""

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
from dit_sparse.bundled import bundled_prompts
from dit_sparse.cli.main import app
from dit_sparse.eval.comparison import runner
from dit_sparse.eval.comparison.clip_store import ClipStore
from dit_sparse.eval.comparison.comparison import Comparison, steps_of_equal_cost
from dit_sparse.eval.comparison.row_syntax import RowRequest, parse_row
from dit_sparse.eval.quality.measures import FAST
from dit_sparse.eval.report.tables import RESULTS
from dit_sparse.methods import KINDS, kind_of, method_text

SMALL = ["--steps", "3", "--frames", "2", "--height", "32", "--width", "32"]
CALL = {"num_inference_steps": 3, "num_frames": 2, "height": 32, "width": 32}
PROMPTS = ["a red circle moves left", "a blue square moves up"]


def no_stages(name):
    return lambda done, total: None


def small_comparison(out: Path, prompts=PROMPTS, **settings) -> Comparison:
    defaults = {"densities": (0.4,), "block": 16, "call": CALL, "schedule": Schedule(1)}
    return Comparison(["radial"], prompts, out, **defaults | settings)


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("comparison")
    return small_comparison(folder, densities=(0.3, 0.5), seeds=2, quality=True).run(no_stages)


# --- results


def test_rows_cover_methods_densities_and_baselines(result):
    names = [row["name"] for row in result["rows"]]
    assert names[:5] == ["dense", "random_blocks 0.3", "radial 0.3", "random_blocks 0.5", "radial 0.5"]
    assert all(row["method"] == "dense" and row["steps"] < 3 for row in result["rows"][5:])
    for row in result["rows"][1:]:
        assert len(row["psnr"]["each"]) == 4 and row["seconds"] > 0 and row["strip"]
        assert row["psnr"]["interval"][0] <= row["psnr"]["mean"] <= row["psnr"]["interval"][1]


def test_rows_hold_the_measurements(result):
    rows = {row["name"]: row for row in result["rows"]}
    assert result["grids"] == ["3x8x8"] and result["steps"] == 3
    assert rows["dense"]["psnr"] is None and rows["dense"]["speedup"] == 1 and rows["dense"]["density_run"] == 1
    assert rows["random_blocks 0.3"]["over_random"]["mean"] == 0
    assert 0 < rows["dense"]["quality"]["temporal_flickering"] < 1
    radial = rows["radial 0.5"]
    assert radial["cvvdp"] is None and list(result["measures"]) == list(FAST)
    assert radial["xpsnr"]["mean"] > 5 and len(radial["xpsnr"]["each"]) == 4
    assert radial["vmaf"] == {"unavailable": "vmaf needs frames of at least 33 x 33 pixels"}
    difference = radial["psnr"]["mean"] - rows["random_blocks 0.5"]["psnr"]["mean"]
    assert radial["over_random"]["mean"] == pytest.approx(difference)
    assert radial["density_hit"] == (abs(radial["density_achieved"] - 0.5) <= 0.01)
    assert 0 < radial["retained"] < 1 and np.shape(radial["mass"]) == (6, 3)
    steps, errors = zip(*radial["latent_error"], strict=True)
    assert steps == (0, 1, 2) and errors[0] == pytest.approx(0, abs=1e-3) and errors[-1] > 0


def test_seeds_begin_at_the_first_one(tmp_path):
    task = small_comparison(tmp_path, prompts=PROMPTS[:1], seeds=2, first_seed=3)
    assert task.run(no_stages)["first_seed"] == 3
    assert {clip.metadata.get("seed") for clip in ClipStore(tmp_path / "clips").clips()} - {None} == {3, 4}
    with pytest.raises(ValueError, match="first seed"):
        small_comparison(tmp_path, first_seed=-1)


DENSE = {"name": "dense", "method": "dense", "steps": 20, "attention_seconds": 60.0, "seconds": 100.0}
DENSE |= {"density_asked": None, "density_achieved": None, "density_run": 1.0}


def summarized(name: str, asked: float | None, achieved: float, run: float) -> dict:
    method = name.partition(" ")[0]
    return {"name": name, "method": method, "density_asked": asked, "density_achieved": achieved, "density_run": run}


def test_steps_of_equal_cost():
    steps = lambda run, **dense: steps_of_equal_cost({"density_run": run}, DENSE | dense)
    assert steps(0.25 + 0.75 * 0.25) == round(20 * (0.4 + 0.6 * (0.25 + 0.75 * 0.25))) == 13
    assert steps(1.0) == 20 and steps(0.5, attention_seconds=0.0) == 20
    assert steps(0.0, attention_seconds=110.0) == 1 and steps(1.1) == 20


def test_later_groups_are_baselines_of_the_measured_rows(tmp_path):
    """Random blocks at the density of a method's own settings, then dense attention with fewer steps of equal cost."""
    comparison = Comparison(["window", "radial@own", "svg@0.3"], PROMPTS, tmp_path)
    rows = [DENSE]
    groups = comparison._row_groups(rows)
    measured = [("random_blocks 0.25", 0.25, 0.26, 0.44), ("window 0.25", 0.25, 0.25, 0.44)]
    measured += [("random_blocks 0.3", 0.3, 0.3, 0.48), ("radial", None, 0.6, 0.7), ("svg 0.3", 0.3, 0.3, 0.99)]
    _, specs = next(groups)
    assert [spec.name for spec in specs] == ["dense", *(name for name, *_ in measured)]
    rows += [summarized(*row) for row in measured]
    _, (baseline,) = next(groups)
    assert baseline.name == "random_blocks 0.6"
    rows.append(summarized("random_blocks 0.6", 0.6, 0.6, 0.7))
    ((_, dense),) = groups
    assert {spec.steps: spec.equal_to for spec in dense} == {
        13: ("random_blocks 0.25", "window 0.25"),
        14: ("random_blocks 0.3",),
        16: ("radial", "random_blocks 0.6"),
    }


def test_single_rows_have_their_own_density(tmp_path):
    comparison = Comparison(
        ["svg@0.3", "radial@own", "profile:shapes-wan-i2v", "window"], PROMPTS, tmp_path, densities=(0.2, 0.1)
    )
    rows = [(spec.method, spec.density) for spec in comparison.specs()]
    assert rows[1:5] == [(name, density) for density in (0.1, 0.2) for name in ("random_blocks", "window")]
    assert rows[0] == ("dense", None)
    assert rows[5:] == [("random_blocks", 0.3), ("svg", 0.3), ("radial", None), ("profile:shapes-wan-i2v", None)]
    assert comparison.specs()[7].processor.settings.method.density is None


def test_every_density_has_random_blocks_once(tmp_path):
    comparison = Comparison(["svg@0.255", "radial@0.4", "svg@0.405", "svg@0.261"], PROMPTS, tmp_path)
    assert [spec.density for spec in comparison.specs() if spec.method == "random_blocks"] == [0.25, 0.4, 0.261]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"methods": ["dense@0.3"]}, "'dense@0.3': dense attention computes all pairs"),
        ({"methods": ["dense@own"]}, "dense attention computes all pairs"),
        ({"methods": ["svg@half"]}, "write METHOD@DENSITY"),
        ({"methods": ["svg@2"]}, "density must be in"),
        ({"methods": ["svg@0.2@0.3"]}, "write METHOD@DENSITY"),
        ({"methods": ["radial(density=0.3)@0.2"]}, "the method sets its density or budget, write radial"),
        (
            {"methods": ["profile:shapes-wan-i2v@0.2"]},
            "the method sets its density or budget, write profile:shapes-wan-i2v",
        ),
        ({"methods": ["radial(dekay=1)"]}, "radial has no setting 'dekay'"),
        ({"densities": [0.00001]}, "density must be in"),
        ({"prompts": ["a", "b", "a"]}, "'a' is given twice"),
        ({"schedule": Schedule(16), "call": {"num_inference_steps": 16}}, "keeps all 16 steps dense"),
        ({"schedule": Schedule(1.0)}, "keeps all 8 steps dense"),
        ({"measures": ["vmav"]}, "there is no measure 'vmav'; there are psnr, ssim"),
    ],
)
def test_invalid_settings_raise_before_any_work(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Comparison(**{"methods": ["radial"], "prompts": PROMPTS, "out": tmp_path / "out"} | settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("svg", RowRequest("svg", "svg", every_density=True)),
        ("radial|sink@0.3", RowRequest("radial|sink@0.3", "radial|sink", 0.3)),
        ("radial@own", RowRequest("radial@own", "radial")),
        ("profile:shapes-wan-i2v", RowRequest("profile:shapes-wan-i2v", "profile:shapes-wan-i2v")),
        ("radial( sink=true )", RowRequest("radial( sink=true )", "radial(sink=true)", every_density=True)),
        ("radial(sink=true)@0.3", RowRequest("radial(sink=true)@0.3", "radial(sink=true)", 0.3)),
        ("radial(density=0.3)", RowRequest("radial(density=0.3)", "radial", 0.3)),
        ("cached(svg(density=0.3))@own", RowRequest("cached(svg(density=0.3))@own", "cached(svg)", 0.3)),
        ("asa(budget=mass(0.9))", RowRequest("asa(budget=mass(0.9))", "asa(budget=mass(0.9))")),
        (
            "pooled(profile:shapes-wan-i2v)",
            RowRequest("pooled(profile:shapes-wan-i2v)", "pooled(profile:shapes-wan-i2v)"),
        ),
        ("dense", RowRequest("dense", "dense")),
    ],
)
def test_row_syntax(text, expected):
    assert parse_row(text) == expected


def test_densities_are_rounded_to_four_digits(tmp_path):
    comparison = Comparison(["radial@0.250002"], PROMPTS, tmp_path, densities=(0.25, 0.2500001))
    assert comparison.densities == [0.25]
    assert [spec.name for spec in comparison.specs()[1:]] == ["random_blocks 0.25", "radial 0.25"]


def test_settings_of_a_row_reach_its_processor(tmp_path):
    texts = ["radial(sink=true)@0.3", "radial(sink=true)@own", "radial(density=0.2)", "asa(budget=mass(0.9))"]
    comparison = Comparison([*texts, "radial@own", "profile:shapes-wan-i2v"], PROMPTS, tmp_path)
    specs = {spec.name: spec.processor.settings for spec in comparison.specs()}
    names = ["radial(sink=true) 0.3", "radial(sink=true)", "radial 0.2", "asa(budget=mass(0.9))", "radial"]
    assert [method_text(specs[name].method) for name in names] == [
        "radial(density=0.3, sink=true)",
        "radial(sink=true)",
        "radial(density=0.2)",
        "asa(budget=mass(0.9))",
        "radial",
    ]
    assert specs["profile:shapes-wan-i2v"].schedule == comparison.schedule


def test_rows_are_unique(tmp_path):
    comparison = Comparison(["radial", "radial@0.25", "radial", "dense"], PROMPTS, tmp_path)
    assert [spec.name for spec in comparison.specs()] == ["dense", "random_blocks 0.25", "radial 0.25"]


def test_all_stands_for_every_method(tmp_path):
    comparison = Comparison(["all", "radial|sink"], PROMPTS, tmp_path)
    assert comparison.methods == [*METHODS, "radial|sink"]


def test_kinds_select_from_all_methods(tmp_path):
    comparison = Comparison(["all", "radial@own"], PROMPTS, tmp_path, kinds=["scorer", "layout"])
    assert comparison.methods == ["dense", "random_blocks", *KINDS["scorer"], *KINDS["layout"], "radial@own"]
    with pytest.raises(ValueError, match="no kind 'scorers'; there are pattern, scorer"):
        Comparison(["all"], PROMPTS, tmp_path, kinds=["scorers"])
    with pytest.raises(ValueError, match="add all to the methods"):
        Comparison(["svg"], PROMPTS, tmp_path, kinds=["scorer"])


@pytest.mark.parametrize(
    "text, kind",
    [
        ("radial(sink=true)", "pattern"),
        ("radial|sink", "pattern"),
        ("svg.temporal", "pattern"),
        ("cached(cached(asa), replan_interval=2)", "scorer"),
        ("rettention(adaspa)", "correction"),
        ("profile:shapes-wan-i2v", "profile"),
        ("my_package:Method", "other"),
    ],
)
def test_kind_of_a_row_is_that_of_its_outermost_method(text, kind):
    assert kind_of(text) == kind


def test_a_failing_row_leaves_the_others_complete(tmp_path, monkeypatch):
    plan = METHODS["radial"].plan

    def fail(self, *arguments):
        if self.density == 0.3:
            raise RuntimeError("out of memory")
        return plan(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(METHODS["radial"], "plan", fail)
        result = small_comparison(tmp_path, PROMPTS[:1], densities=(0.3, 0.4)).run(no_stages)
    assert result["finished"] and result["failures"] == [{"name": "radial 0.3", "error": "out of memory"}]
    assert [row["name"] for row in result["rows"][:4]] == [
        "dense",
        "random_blocks 0.3",
        "random_blocks 0.4",
        "radial 0.4",
    ]
    result = small_comparison(tmp_path, PROMPTS[:1], densities=(0.3, 0.4)).run(no_stages)
    assert not result["failures"] and result["rows"][2]["name"] == "radial 0.3"
    assert [row["kind"] for row in result["rows"][:3]] == ["pattern"] * 3


def test_command_names_failed_rows(tmp_path, monkeypatch):
    stored = json.loads((RESULTS / "cpu" / "compare.json").read_text())
    result = stored | {"failures": [{"name": "radial 0.25", "error": "out of memory"}]}
    monkeypatch.setattr(Comparison, "run", lambda *_: result)
    run = CliRunner().invoke(app, ["compare", "--methods", "all", "--kind", "scorer", "--out", str(tmp_path)])
    assert run.exit_code == 1 and "radial 0.25 failed: out of memory" in run.stderr
    assert "Failed: radial 0.25 (out of memory)." in (tmp_path / "report.html").read_text()
    assert "Density 0.25" in run.output and "scorers" in run.output


# --- resuming


def test_stored_clips_are_not_generated_again(tmp_path, monkeypatch):
    first = small_comparison(tmp_path).run(no_stages)
    monkeypatch.setattr(runner, "generate", lambda *_: pytest.fail("generated again"))
    again = small_comparison(tmp_path).run(no_stages)
    assert again | {"load": first["load"]} == first
    with pytest.raises(pytest.fail.Exception):
        small_comparison(tmp_path, prompts=[*PROMPTS, "a green triangle moves up"]).run(no_stages)


def test_an_unfinished_result_does_not_replace_a_finished_one(tmp_path, monkeypatch):
    path, draft = tmp_path / "compare.json", tmp_path / "compare.unfinished.json"
    comparison = small_comparison(tmp_path, PROMPTS[:1])
    monkeypatch.setattr(runner.ClipRunner, "attention_errors", lambda *_: {})
    monkeypatch.setattr(runner.ClipRunner, "generate_missing", lambda *_: {})
    row = summarized("radial 0.4", 0.4, 0.4, 0.6) | DENSE | {"psnr": None, "grids": ["1x2x3"], "equal_to": []}

    def summarize_row(spec, *_):
        if spec.name == stop:
            raise KeyboardInterrupt
        return row | {"name": spec.name, "density_asked": spec.density}

    monkeypatch.setattr("dit_sparse.eval.comparison.comparison.summarize_row", summarize_row)
    stop = "radial 0.4"
    with pytest.raises(KeyboardInterrupt):
        comparison.run(no_stages)
    assert json.loads(path.read_text())["finished"] is False and not draft.exists()
    stop = None
    finished = comparison.run(no_stages)
    assert finished["finished"] and json.loads(path.read_text()) == json.loads(json.dumps(finished))
    stop = "random_blocks 0.4"
    with pytest.raises(KeyboardInterrupt):
        comparison.run(no_stages)
    assert json.loads(path.read_text()) == json.loads(json.dumps(finished))
    assert len(json.loads(draft.read_text())["rows"]) == 1
    stop = None
    comparison.run(no_stages)
    assert not draft.exists()


def test_a_killed_comparison_resumes_with_the_same_result(tmp_path):
    command = [sys.executable, "-m", "dit_sparse.cli", "compare", "--methods", "radial", "--prompts", "2"]
    command += ["--density", "0.4", "--block", "16", *SMALL, "--dense-steps", "1", "--executor", "gather"]
    command += ["--out", str(tmp_path / "killed")]
    clips = tmp_path / "killed" / "clips"
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while len(list(clips.glob("[!.]*.npz"))) < 3 and run.poll() is None:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    before = {path: path.stat().st_mtime_ns for path in clips.glob("[!.]*.npz")}
    prompts = bundled_prompts()[:2]
    killed, uninterrupted = (
        small_comparison(tmp_path / out, prompts, executor="gather").run(no_stages) for out in ("killed", "complete")
    )
    assert len(before) >= 3 and all(path.stat().st_mtime_ns == time_ns for path, time_ns in before.items())
    for a, b in zip(killed["rows"][:3], uninterrupted["rows"][:3], strict=True):
        for key in ("name", "density_achieved", "density_run", "psnr", "ssim", "ms_ssim", "mass", "latent_error"):
            assert a[key] == b[key], key


@pytest.mark.parametrize(
    "options, message",
    [
        (["--density", "a"], "numbers separated by commas"),
        (["--density", ""], "no density"),
        (["--density", "0.2,3"], "density must be in"),
        (["--methods", "svg@x"], "METHOD@DENSITY"),
    ],
)
def test_invalid_options_are_refused(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(app, ["compare", *options])
    assert run.exit_code == 2 and message in run.output.replace("\n", " "), run.output
    assert os.listdir(tmp_path) == []
