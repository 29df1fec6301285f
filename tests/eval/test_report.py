"""The HTML page and the tables of a comparison, made from stored results."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from dit_sparse.cli.main import app
from dit_sparse.eval.report import page
from dit_sparse.eval.report.tables import RESULTS, branches_table, compare_table

LARGEST = json.loads((RESULTS / "cpu" / "compare.json").read_text())
QUALITY = {"temporal_flickering": 0.9, "imaging_quality": {"unavailable": "weights are missing"}}


@pytest.fixture
def result() -> dict:
    """The first rows of a stored comparison, with quality scores."""
    return LARGEST | {"rows": [row | {"quality": QUALITY} for row in LARGEST["rows"][:6]]}


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.text, self.sources = [], [], []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_stands_alone_and_has_every_row(result):
    tags = _Tags()
    tags.feed(page.page(result))
    assert not tags.open
    assert tags.sources and all(source.startswith("data:") for source in tags.sources)
    text = " ".join(tags.text)
    for row in result["rows"]:
        assert text.count(row["name"]) >= 2
    for told in (*result["prompts"], result["device"], "dense_steps", "temporal flickering", "imaging quality"):
        assert told in text


def test_a_density_that_was_missed_is_marked():
    missed = [row["name"] for row in LARGEST["rows"] if row["density_hit"] is False]
    (line,) = [line for line in compare_table(LARGEST).splitlines() if "(!)" in line]
    assert missed == ["rettention(subblock) 0.25"] and missed[0] in line
    told = page.page(LARGEST)
    (after,) = told.split("<span class=missed")[1:]
    assert told.split("<span class=missed")[0].endswith(f"<td>{missed[0]}</td><td>") and "0.583 !" in after[:60]


def test_a_dense_row_stands_beside_the_densities_of_its_cost():
    rows = [dict(row) for row in LARGEST["rows"]]
    most_of_15 = [row["name"] for row in rows if row["density_asked"] == 0.15][1:]
    rows[-2]["equal_to"], rows[-1]["equal_to"] = most_of_15, ["svg 0.25", "profile:shapes-wan"]
    result = LARGEST | {"rows": rows}
    told, one = compare_table(result), compare_table(result, 0.15)
    assert "`dense, 6 steps`, costs like 0.15 |" in told
    assert "`dense, 7 steps`, costs like svg 0.25, profile:shapes-wan |" in told
    rows[-1]["equal_to"] = ["svg 0.25"]
    assert "`dense, 7 steps`" in one and "dense, 7 steps" not in compare_table(result, 0.15)
    assert "`dense, 6 steps`" in one and "`svg 0.15`" in one and "`svg 0.25`" not in one
    assert "dense, 6 steps, costs like 0.15" in page.page(result)


def test_one_plan_stands_beside_a_plan_each():
    worse = [row | {"psnr": row["psnr"] and row["psnr"] | {"mean": 20.0}} for row in LARGEST["rows"]]
    apart = LARGEST | {"schedule": LARGEST["schedule"] | {"per_branch": True}}
    apart |= {"rows": [row for row in worse if row["name"] in ("dense", "radial 0.25", "random_blocks 0.25")]}
    (radial,) = [row for row in LARGEST["rows"] if row["name"] == "radial 0.25"]
    told = branches_table(LARGEST, apart)
    assert f"| {radial['psnr']['mean'] - 20:+.1f} |" in told and told.count("\n| `") == 1 and "`radial 0.25`" in told
    with pytest.raises(ValueError, match="differ in block, too"):
        branches_table(LARGEST, apart | {"block": 99})


def test_what_a_comparison_cannot_say_is_said():
    why = "`lpips` needs weights"
    assert "Unfinished" not in page.page(LARGEST) + compare_table(LARGEST)
    part = LARGEST | {"finished": False, "rows": LARGEST["rows"][:5]}
    part["rows"] = [row | {"lpips": row["lpips"] and {"unavailable": why}} for row in part["rows"]]
    for told in (page.page(part), compare_table(part)):
        assert "only the first 5 rows" in told and "slow minutes" in told
    assert f"LPIPS is not here: {why}" in page.page(part)


def test_the_page_does_not_run_what_a_prompt_says(result):
    told = page.page(result | {"prompts": ["<script>alert(1)</script>"]})
    assert "<script>" not in told and "&lt;script&gt;" in told


def test_report_needs_the_json_alone(result, tmp_path):
    (tmp_path / "compare.json").write_text(json.dumps(result))
    table = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert table.exit_code == 0 and all(f"`{row['name']}`" in table.output for row in result["rows"])
    run = CliRunner().invoke(app, ["report", str(tmp_path / "compare.json"), "--html"])
    assert run.exit_code == 0 and (tmp_path / "report.html").read_text() == page.page(result)


@pytest.mark.parametrize(
    "content", ["", "[1]", "{}", '{"model": 1, "rows": [1], "prompts": 1, "schedule": 1, "device": 1}']
)
def test_report_refuses_what_is_no_result(tmp_path, content):
    (tmp_path / "compare.json").write_text(content)
    run = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert run.exit_code == 2 and "is no result of" in run.output.replace("\n", " ")
    assert CliRunner().invoke(app, ["report", str(tmp_path / "nowhere")]).exit_code == 2
