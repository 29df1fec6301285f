"""Merging of comparisons: every row once with its device and commit, and a refusal if conditions differ."""

from __future__ import annotations

import base64
import copy
import json
from io import BytesIO

import pytest
from PIL import Image, ImageOps
from typer.testing import CliRunner

from dit_sparse.cli.main import app
from dit_sparse.eval.comparison.merge import merge_results
from dit_sparse.eval.report.comparison_tables import compare_table
from dit_sparse.eval.report.page import render_page
from dit_sparse.eval.report.tables import RESULTS

STORED = {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("cpu/compare*.json"))}
WHOLE = next(iter(STORED.values()))
NEW_KEYS = {"device", "executor", "commits"}


def part(selection: slice, **changes) -> dict:
    """The dense row and some others of a stored comparison, as if they had been measured under other conditions."""
    chosen = [WHOLE["rows"][0], *WHOLE["rows"][1:][selection]]
    return copy.deepcopy({key: value for key, value in WHOLE.items() if key != "rows"} | {"rows": chosen} | changes)


def without(row: dict, keys: set[str]) -> dict:
    return {key: value for key, value in row.items() if key not in keys}


@pytest.mark.parametrize("name", STORED)
def test_every_stored_result_merges_with_itself(name):
    merged = merge_results([STORED[name], STORED[name]])
    assert [row["name"] for row in merged["rows"]] == [row["name"] for row in STORED[name]["rows"]]
    assert merged["differences"] == STORED[name].get("differences", [])
    assert len(merged["sources"]) == 2 * len(STORED[name].get("sources", [None]))
    assert all(row["commits"] and row["device"] == STORED[name]["device"] for row in merged["rows"])


def test_parts_of_a_comparison_merge_to_the_whole():
    merged = merge_results([part(slice(0, 4)), part(slice(4, None), device="GPU", commit="abc")])
    for row, expected in zip(merged["rows"], WHOLE["rows"], strict=True):
        assert without(row, NEW_KEYS) == without(expected, NEW_KEYS)
    assert [row["device"] for row in merged["rows"][:6]] == [WHOLE["device"]] * 5 + ["GPU"]
    assert merged["device"] == f"{WHOLE['device']}, GPU" and merged["finished"]


def test_rows_keep_their_commit_also_when_merged_twice():
    first, second, third = part(slice(0, 1)), part(slice(1, 2), commit="b"), part(slice(2, 3), commit="c")
    for one in (second, third):
        one["rows"][1].pop("commits", None)
    merged = merge_results([merge_results([first, second]), third])
    assert [row["commits"] for row in merged["rows"][2:]] == [["b"], ["c"]]
    assert [source["commit"] for source in merged["sources"]] == [WHOLE["commit"], "b", "c"]
    assert merged["rows"] == merge_results([first, second, third])["rows"]


def test_a_row_of_several_results_is_taken_once_and_other_numbers_are_reported():
    other = part(slice(0, 2), device="GPU")
    other["rows"][2]["psnr"]["mean"] = 12.34
    merged = merge_results([part(slice(0, 3)), other])
    assert len(merged["rows"]) == 4 and merged["rows"][2]["psnr"] == WHOLE["rows"][2]["psnr"]
    kept = f"{WHOLE['rows'][2]['psnr']['mean']:.1f}"
    name = WHOLE["rows"][2]["name"]
    assert merged["differences"] == [{"name": name, "numbers": {"PSNR": [kept, "12.3"]}, "device": "GPU"}]
    assert f"{name} (PSNR {kept}, not 12.3)" in compare_table(merged)


def test_dense_runs_with_fewer_steps_come_last_and_equal_rows_of_all_results():
    shorter = WHOLE["rows"][-1]
    first, second = part(slice(0, 1)), part(slice(1, 2))
    for one, equal in ((first, "a"), (second, "b")):
        one["rows"].append(shorter | {"equal_to": [equal]})
    merged = merge_results([first, second])
    assert merged["rows"][-1] == merged["rows"][-1] | {"name": shorter["name"], "equal_to": ["a", "b"]}
    assert len(merged["rows"]) == 4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "x/y"}, "model differs, 'shapes-wan' and 'x/y'"),
        ({"call": WHOLE["call"] | {"num_frames": 99}}, r"call differs, \{'num_frames': \d+\} and \{'num_frames': 99\}"),
        ({"prompts": ["a cat"]}, "prompts differs"),
        ({"first_seed": 9}, "first_seed differs"),
        ({"schedule": WHOLE["schedule"] | {"dense_steps": 0.5}}, "schedule differs, {'dense_steps': 0.25} and"),
        ({"block": 32}, "block differs, None and 32"),
        ({"finished": False}, "result 2 is not finished"),
        ({"rows": []}, "result 2 is not a result of dit-sparse compare: rows"),
    ],
)
def test_other_conditions_are_refused_with_the_reason(changes, reason):
    with pytest.raises(ValueError, match=reason):
        merge_results([WHOLE, part(slice(0, 1), **changes)])


def test_results_of_other_weights_are_refused():
    """Their dense clips of the same prompt and seed differ."""
    other = part(slice(0, 1))
    strip, file = Image.open(BytesIO(base64.b64decode(other["rows"][0]["strip"]))), BytesIO()
    ImageOps.invert(strip.convert("RGB")).save(file, "WEBP")
    other["rows"][0]["strip"] = base64.b64encode(file.getvalue()).decode()
    with pytest.raises(ValueError, match="dense clips of the first prompt differ"):
        merge_results([WHOLE, other])


def test_failures_that_another_result_completed_are_not_kept():
    failed = [{"name": row["name"], "error": "no memory"} for row in WHOLE["rows"][1:3]]
    merged = merge_results([part(slice(2, 3), failures=failed), part(slice(0, 1))])
    assert merged["failures"] == failed[1:]


def test_report_merges_folders(tmp_path):
    for name, rows in (("a", slice(0, 2)), ("b", slice(2, 4))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "compare.json").write_text(json.dumps(part(rows, commit=name)))
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    run = CliRunner().invoke(app, ["report", *folders, "--html", "--out", str(tmp_path / "c")])
    assert run.exit_code == 0, run.output
    merged = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert len(merged["rows"]) == 5 and merged["commit"] == "a, b"
    assert (tmp_path / "c" / "report.html").read_text() == render_page(merged)
    table = CliRunner().invoke(app, ["report", *folders])
    assert "Merged comparisons: 3 rows" in table.output
    for refused in ([*folders, "--html"], [*folders, "--out", folders[0]]):
        run = CliRunner().invoke(app, ["report", *refused])
        assert run.exit_code == 2 and "--out" in run.output
