"""`eval video`, `eval export`, `eval attention`, `bench scaling` and `report`, and the files they read."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from dit_sparse.cli.main import app
from dit_sparse.cli.options import read_prompts
from dit_sparse.eval.comparison.clip_store import ClipRecord, ClipStore
from dit_sparse.eval.comparison.result_schema import read_result
from dit_sparse.eval.report.page import render_page
from dit_sparse.eval.report.tables import RESULTS
from dit_sparse.output.files import atomic_write, json_values, save_json
from dit_sparse.output.media import read_video, save_video

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


def test_video_prints_quality_and_fidelity_to_a_reference(videos):
    command = ("eval", "video", videos / "a.mp4", "--reference")
    result = run(*command, videos / "b.mp4")
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in ("temporal_flickering", "ms_ssim", "cvvdp"))
    found = json.loads(run(*command, videos / "b.mp4", "--json", "--measures", "xpsnr,vmaf").stdout)
    assert 0 < found["quality"]["temporal_flickering"] < 1 and 5 < found["fidelity"]["psnr"]["pooled"] < 30
    assert 0 < found["fidelity"]["vmaf"]["pooled"] < 100 and found["fidelity"]["xpsnr"]["pooled"] > 5
    assert found["fidelity"].keys() == {"psnr", "ssim", "xpsnr", "vmaf"}
    same = run(*command, videos / "a.mp4", "--json", "--measures", "psnr")
    assert json.loads(same.stdout)["fidelity"]["psnr"]["pooled"] == "inf"


def test_videos_are_read_as_written(videos):
    frames, fps = read_video(videos / "a.mp4")
    assert frames.shape[0] == 3 and frames.dtype == np.uint8 and fps == 8


def stored_result() -> dict:
    """A stored comparison, changed to one prompt and two seeds."""
    result = json.loads((RESULTS / "cpu" / "compare.json").read_text())
    rows = [row | {"seconds": 3.0} for row in result["rows"][:3]]
    return result | {"prompts": ["a red circle"], "seeds": 2, "rows": rows}


def put(shelf: ClipStore, row: dict, seed: int, frames: np.ndarray, **other: object) -> None:
    note = {"row": row["name"], "prompt": "a red circle", "seed": seed, "seconds": 1.5, "grids": []}
    note |= {"settings": row["settings"], "steps": row["steps"]} | other
    shelf.put(row["name"], note, ClipRecord(frames, note))


@pytest.mark.parametrize(
    "other", [{"steps": 99}, {"settings": {}}, {"grids": ["1x1x1"]}, {"seconds": 7.0}, {"seed": 2}]
)
def test_clips_of_a_row_are_written_for_vbench(tmp_path, other):
    """And not what another comparison left in the folder, earlier or later."""
    result, shelf = stored_result(), ClipStore(tmp_path / "clips")
    (tmp_path / "compare.json").write_text(json.dumps(result))
    own = result["rows"][1]
    for seed in (0, 1):
        put(shelf, own, **{"seed": seed, "frames": clip(9)} | other)
    for row in result["rows"]:
        for seed in (0, 1):
            put(shelf, row, seed, clip(seed))
    for seed in (0, 1):
        put(shelf, own, **{"seed": seed, "frames": clip(8), "prompt": "another"})
        put(shelf, own, **{"seed": seed, "frames": clip(8), "seconds": 6.5} | other)
    written = run("eval", "export", tmp_path, "--row", own["name"], "--out", tmp_path / "vbench")
    assert written.exit_code == 0 and "2 videos" in written.output, written.output
    videos = sorted((tmp_path / "vbench" / "videos").iterdir())
    assert [path.name for path in videos] == ["a red circle-0.mp4", "a red circle-1.mp4"]
    for seed, path in enumerate(videos):
        frames, fps = read_video(path)
        assert fps == 8 and np.abs(frames.astype(int) - clip(seed)).max() <= 3


def test_export_holds_one_clip_at_a_time(tmp_path, monkeypatch):
    result, shelf, held = stored_result(), ClipStore(tmp_path / "clips"), []
    (tmp_path / "compare.json").write_text(json.dumps(result | {"model": "some/model"}))
    for seed in (0, 1):
        put(shelf, result["rows"][0], seed, clip(seed))

    def export(folder, clips, fps):
        held.extend([iter(clips) is clips, fps])
        return folder

    monkeypatch.setattr("dit_sparse.eval.quality.vbench_export.export", export)
    assert run("eval", "export", tmp_path).exit_code == 0
    assert held == [True, 16]


def test_attention_writes_efficiencies_and_plots(tmp_path):
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
        (["eval", "video", "nowhere.mp4"], "cannot read nowhere.mp4: No such file"),
        (["eval", "export", "nowhere"], "not a result of dit-sparse compare"),
        (["eval", "attention", "--methods", "nope"], "no method 'nope'"),
        (["eval", "attention", "--density", "x"], "numbers separated by commas"),
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


def test_missing_clips_are_named(tmp_path):
    result = stored_result()
    (tmp_path / "compare.json").write_text(json.dumps(result))
    for given, words in (("svg 0.1", "there are dense, random_blocks"), ("dense", "has no clips")):
        refused = run("eval", "export", tmp_path, "--row", given, "--out", tmp_path / "out")
        assert refused.exit_code == 2 and words in refused.output.replace("\n", " ")
        assert not (tmp_path / "out").exists()
    put(ClipStore(tmp_path / "clips"), result["rows"][0], 0, clip(0))
    refused = run("eval", "export", tmp_path, "--out", tmp_path / "out")
    assert refused.exit_code == 2 and "1 clips of 'dense' are not in" in refused.output.replace("\n", " ")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/compare*.json")), ids=lambda path: path.parent.name)
def test_stored_results_are_read(path):
    assert render_page(read_result(path)).rstrip().endswith("</html>")


def damaged(**changes: object) -> dict:
    result = stored_result()
    result["rows"][1] |= changes.pop("row", {})
    return result | changes


@pytest.mark.parametrize(
    "result, words",
    [
        (damaged(rows=5), "rows: Input should be a valid list"),
        (damaged(rows=[]), "rows: List should have at least 1"),
        (damaged(prompts=1), "prompts: Input should be a valid list"),
        (damaged(prompts=[]), "prompts: List should have at least 1"),
        (damaged(rows=[{"over_random": None}]), "rows.0.name: Field required"),
        (damaged(grids=None), "grids: Input should be a valid list"),
        (damaged(steps=0), "steps: Input should be greater than 0"),
        (damaged(versions={}), "versions contain no torch"),
        (damaged(row={"psnr": {"mean": 1.0}}), "rows.1.psnr.median: Field required"),
        (damaged(row={"mass": [[]]}), "rows.1.mass.0: List should have"),
        (damaged(row={"speedup": "2"}), "rows.1.speedup: Input should be a valid number"),
        (damaged(row={"strip": "' onload='alert(1)"}), "rows.1.strip: String should match"),
        ({key: value for key, value in stored_result().items() if key != "steps"}, "steps: Field required"),
    ],
)
def test_a_damaged_result_is_one_sentence(result, words, tmp_path):
    (tmp_path / "compare.json").write_text(json.dumps(result))
    for more in ([], ["--html"]):
        refused = run("report", tmp_path, *more)
        assert refused.exit_code == 2 and words in refused.output.replace("\n", " "), refused.output
    assert not (tmp_path / "report.html").exists()


def test_unwritable_pages_are_one_sentence(tmp_path):
    (tmp_path / "compare.json").write_text(json.dumps(stored_result()))
    (tmp_path / "report.html").mkdir()
    refused = run("report", tmp_path, "--html")
    assert refused.exit_code == 2 and "report.html: Is a directory" in refused.output.replace("\n", "")
    assert {path.name for path in tmp_path.iterdir()} == {"compare.json", "report.html"}


def test_json_has_no_infinity_or_nan(tmp_path):
    save_json(tmp_path / "x.json", {"a": [np.inf, (-np.inf, 1.5)], "b": float("nan"), "c": {"d": True, "e": None}})
    told = (tmp_path / "x.json").read_text()
    assert json.loads(told, parse_constant=lambda name: pytest.fail(name)) == {
        "a": ["inf", ["-inf", 1.5]],
        "b": None,
        "c": {"d": True, "e": None},
    }
    assert json_values({"psnr": np.inf}) == {"psnr": "inf"} and float("inf") == np.inf


def test_concurrent_writes_of_a_file_have_their_own_partial_files(tmp_path):
    """Two threads of one process may write it."""
    with atomic_write(tmp_path / "x.json") as one, atomic_write(tmp_path / "x.json") as other:
        assert one != other
        for draft in (one, other):
            assert draft.match(".x.*.json")
            draft.write_text(draft.name)
    assert (tmp_path / "x.json").read_text() == one.name and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "name, content, prompts",
    [
        ("a.txt", "\ufeffa cat\n\n a dog \n", ["a cat", "a dog"]),
        ("a.csv", 'id,prompt\n1,a cat\n2,"a dog, black"\n', ["a cat", "a dog, black"]),
        ("a.jsonl", '{"prompt": "a cat"}\n', ["a cat"]),
    ],
)
def test_prompts_are_read_from_files(tmp_path, name, content, prompts):
    (tmp_path / name).write_text(content)
    assert read_prompts(str(tmp_path / name)) == prompts


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.csv", "prompt,seed\na cat,1\n", "sets seed, which only"),
        ("a.txt", "\n", "there are no prompts"),
        ("a.md", "a cat", "a prompt file must be one of"),
    ],
)
def test_invalid_prompt_files_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    refused = run("profile", "shapes-wan-i2v", "--check", "shapes-wan-i2v", "--prompts", tmp_path / name)
    assert refused.exit_code == 2 and words in refused.output.replace("\n", " ")


@pytest.mark.parametrize(
    "command, words",
    [
        (["bench", "scaling", "--out", "."], "--out must be a file, got the folder ."),
        (["bench", "attention", "--out", "."], "--out must be a file"),
        (["bench", "transformer", "--out", "."], "--out must be a file"),
        (["bench", "tail", "--out", "."], "--out must be a file"),
        (["bench", "tail", "--threads", "1,no"], "--threads must be numbers separated by commas"),
        (["bench", "scaling", "--methods", "svg", "--max-tokens", "1"], "nothing is measured"),
    ],
)
def test_unwritable_files_are_refused_before_the_work(command, words, videos, monkeypatch):
    monkeypatch.chdir(videos)
    work = ("bench.scaling.Scaling.run", "bench.attention.measure_case", "bench.transformer.measure_model")
    for name in (*work, "bench.pooled_tail.measure"):
        monkeypatch.setattr(f"dit_sparse.eval.{name}", lambda *_: pytest.fail("work began"))
    refused = run(*command)
    assert refused.exit_code == 2 and words in refused.output.replace("\n", " "), refused.output
