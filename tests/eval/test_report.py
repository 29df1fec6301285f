"""The HTML page and the tables of a comparison, made from stored results."""

from __future__ import annotations

import io
import json
import shutil
from html.parser import HTMLParser
from itertools import groupby

import pytest
from rich.console import Console
from typer.testing import CliRunner

from attention_cases import ALL
from dit_sparse.cli.compare import _comparison_tables
from dit_sparse.cli.main import app
from dit_sparse.eval.report.comparison_tables import TIMING_NOTE, branches_table, compare_table
from dit_sparse.eval.report.page import render_page
from dit_sparse.eval.report.tables import RESULTS
from dit_sparse.plotting.style import DARK, LIGHT

LARGEST = json.loads((RESULTS / "cpu" / "compare.json").read_text())
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(not (BROWSER or ALL), reason="requires Chromium")
QUALITY = {"temporal_flickering": 0.9, "imaging_quality": {"unavailable": "weights are missing"}}


@pytest.fixture
def result() -> dict:
    """The first rows of a stored comparison, with quality scores."""
    return LARGEST | {"rows": [row | {"quality": QUALITY} for row in LARGEST["rows"][:6]]}


@pytest.fixture(scope="module")
def page() -> str:
    """The report of the stored comparison."""
    return render_page(LARGEST)


class _Tags(HTMLParser):
    """Checks that tags are closed, and collects the text, the cells of each table row and all addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.rows, self.addresses, self.ids = [], [], {}, [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert tag != "script" and not any(name.startswith("on") for name in attrs)
        self.addresses += [attrs[name] for name in ("src", "href") if name in attrs]
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag not in ("meta", "img"):
            self.open.append((tag, attrs.get("id")))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text.append(data)
        for tag, name in self.open:
            if tag == "tr" and name:
                self.rows.setdefault(name, []).append(data.strip())


def parsed(html: str) -> _Tags:
    tags = _Tags()
    tags.feed(html)
    assert not tags.open
    return tags


def test_report_needs_no_other_file_and_all_its_links_lead_somewhere(result):
    tags = parsed(render_page(result))
    assert len(tags.ids) == len(set(tags.ids))
    for address in tags.addresses:
        assert address.startswith("data:") or address.removeprefix("#") in tags.ids, address
    text = " ".join(tags.text)
    for expected in (*result["prompts"], result["device"], "dense_steps", "temporal flickering", "imaging quality"):
        assert expected in text


def test_table_has_every_number_of_every_row(page):
    """What tooltips and charts show can be read without a mouse."""
    tags = parsed(page)
    assert len(tags.rows) == len(LARGEST["rows"]) > 40
    for number, row in enumerate(LARGEST["rows"]):
        cells = tags.rows[f"row-{number}"]
        assert cells[1 if cells[0] == "" else 0] == row["name"] or row["name"] in cells
        numbers = [f"{row['density_run']:.2f}", f"{row['speedup']:.2f}x", f"{row['planning_share']:.0%}"]
        if row["psnr"]:
            numbers += [f"{row['psnr']['mean']:.1f}", "{:.1f} to {:.1f}".format(*row["psnr"]["interval"])]
        assert set(numbers) <= set(cells), row["name"]


def test_charts_label_every_row(page):
    """Both Pareto plots, wide and narrow, name each method; the interval plots name each row."""
    text = " ".join(parsed(page).text)
    for row in LARGEST["rows"]:
        if row["psnr"]:
            assert text.count(row["name"]) >= 4, "tooltips, interval plot, table, frames"
            assert text.count(row["name"] if row["method"] == "dense" else row["method"]) >= 8


def test_report_has_a_light_and_a_dark_theme(result):
    html = render_page(result)
    light, dark = html.split("prefers-color-scheme: dark")[:2]
    for name, color in LIGHT.css_variables().items():
        assert f"{name}: {color};" in light and f"{name}: {DARK.css_variables()[name]};" in dark
    assert f"fill: {LIGHT.ink}" not in html, "figures take their colours from the theme"


def test_rows_are_grouped_by_kind():
    """Also in results without the kinds, which are older."""
    assert "kind" not in LARGEST["rows"][0]
    lines = [line.split(" | ")[:2] for line in compare_table(LARGEST, 0.25).splitlines()[2:] if line.startswith("|")]
    kinds = [kind.removeprefix("| ") for kind, _ in lines]
    expected = ["baseline", "profile", "baseline", "pattern", "scorer", "layout", "schedule", "correction"]
    assert [kind for kind, _ in groupby(kinds)] == expected
    text = " ".join(parsed(render_page(LARGEST)).text)
    titles = ["Density 0.25: patterns", "Density 0.25: scorers", "No density requested: profiles"]
    assert all(title in text for title in titles)


@pytest.mark.parametrize("width", [80, 120])
def test_table_of_the_command_fits_the_width(width):
    console = Console(width=width, file=io.StringIO())
    names = {row["name"] for row in LARGEST["rows"] if row["density_asked"] is None}
    names |= {row["method"] for row in LARGEST["rows"] if row["density_asked"]}
    for table in _comparison_tables(LARGEST["rows"]):
        console.print(table)
    text = console.file.getvalue()
    assert "\N{HORIZONTAL ELLIPSIS}" not in text and max(map(len, text.splitlines())) <= width
    for heading in ["density", "error", "mass", "PSNR", "random", "SSIM", "attention", "speedup", "planning"]:
        assert heading in text
    first = next(line.index("density") for line in text.splitlines() if line.startswith("method")) - 1
    folded = "".join(line[:first] for line in text.splitlines()).replace(" ", "")
    assert all(name.replace(" ", "") in folded for name in names)


def test_failed_rows_and_other_commits_are_named(result):
    result |= {"failures": [{"name": "svg 0.25", "error": "out of memory"}]}
    result["rows"][1]["commits"] = ["abc", result["commit"]]
    for text in (compare_table(result), render_page(result)):
        assert "Failed: svg 0.25 (out of memory)." in text and "Some clips were generated at abc" in text


def test_missed_density_is_marked(page):
    missed = [row["name"] for row in LARGEST["rows"] if row["density_hit"] is False]
    (line,) = [line for line in compare_table(LARGEST).splitlines() if "(!)" in line]
    assert missed == ["rettention(subblock) 0.25"] and missed[0] in line
    (cells,) = [cells for cells in parsed(page).rows.values() if "asked 0.25" in cells]
    assert missed[0] in cells and "0.583" in cells


def test_dense_run_names_the_rows_of_the_same_cost():
    rows = [dict(row) for row in LARGEST["rows"]]
    most_of_15 = [row["name"] for row in rows if row["density_asked"] == 0.15][1:]
    rows[-2]["equal_to"], rows[-1]["equal_to"] = most_of_15, ["svg 0.25", "profile:shapes-wan"]
    result = LARGEST | {"rows": rows}
    full, one = compare_table(result), compare_table(result, 0.15)
    assert "`dense, 6 steps`, same cost as 0.15 |" in full
    assert "`dense, 7 steps`, same cost as svg 0.25, profile:shapes-wan |" in full
    rows[-1]["equal_to"] = ["svg 0.25"]
    assert "`dense, 7 steps`" in one and "dense, 7 steps" not in compare_table(result, 0.15)
    assert "`dense, 6 steps`" in one and "`svg 0.15`" in one and "`svg 0.25`" not in one
    assert "same cost as 0.15" in parsed(render_page(result)).rows[f"row-{len(rows) - 2}"]


def test_one_plan_stands_beside_a_plan_each():
    worse = [row | {"psnr": row["psnr"] and row["psnr"] | {"mean": 20.0}} for row in LARGEST["rows"]]
    apart = LARGEST | {"schedule": LARGEST["schedule"] | {"per_branch": True}}
    apart |= {"rows": [row for row in worse if row["name"] in ("dense", "radial 0.25", "random_blocks 0.25")]}
    (radial,) = [row for row in LARGEST["rows"] if row["name"] == "radial 0.25"]
    told = branches_table(LARGEST, apart)
    assert f"| {radial['psnr']['mean'] - 20:+.1f} |" in told and told.count("\n| `") == 1 and "`radial 0.25`" in told
    with pytest.raises(ValueError, match="must not differ in block"):
        branches_table(LARGEST, apart | {"block": 99})


def test_missing_rows_and_metrics_are_named(page):
    reason = "`lpips` needs weights"
    assert "Unfinished" not in page + compare_table(LARGEST)
    part = LARGEST | {"finished": False, "rows": LARGEST["rows"][:5]}
    part["rows"] = [row | {"lpips": row["lpips"] and {"unavailable": reason}} for row in part["rows"]]
    for text in (render_page(part), compare_table(part)):
        assert "only the first 5 rows" in text and TIMING_NOTE in text
    assert f"LPIPS is not available: {reason}" in render_page(part)


def test_report_of_dense_rows_or_of_equal_clips_has_no_charts(result):
    dense = parsed(render_page(result | {"rows": result["rows"][:1]}))
    assert "No row can be compared with the dense video yet." in " ".join(dense.text)
    equal = result["rows"][1]["psnr"] | {"mean": None, "median": None, "interval": None, "each": [None]}
    rows = [result["rows"][0], result["rows"][1] | {"psnr": equal, "over_random": None}]
    assert "inf" in parsed(render_page(result | {"rows": rows})).rows["row-1"]


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", "' onload='alert(1)", '"><img src=x>', "$\\frac{", "a\0b"]
)
def test_report_escapes_every_string(result, hostile):
    rows = [row | {"name": hostile, "method": hostile, "quality": {hostile: 0.5}} for row in result["rows"][1:3]]
    rows[0]["lpips"] = {"unavailable": hostile}
    rows[1]["strip"] = hostile
    result |= {"rows": rows, "prompts": [hostile], "model": hostile, "device": hostile, "call": {hostile: hostile}}
    images = [address for address in parsed(render_page(result)).addresses if not address.startswith("#")]
    assert len(images) == len(rows) and all(image.startswith("data:image/webp") for image in images)


@pytest.mark.parametrize("key", ["speedup", "density_run", "planning_share", "density_achieved"])
def test_report_refuses_text_in_the_place_of_a_number(result, key):
    rows = [row | {key: "<b>1</b>"} for row in result["rows"]]
    with pytest.raises((TypeError, ValueError)):
        render_page(result | {"rows": rows})


@in_a_browser
def test_report_fits_the_width_of_the_window(page, tmp_path):
    from playwright.sync_api import sync_playwright

    (tmp_path / "report.html").write_text(page)
    cut = """[...document.querySelectorAll(".plot text")].filter(text => {
        const box = text.getBoundingClientRect(), card = text.closest(".card").getBoundingClientRect()
        return box.width && (box.left < card.left || box.right > card.right)
    }).length"""
    left = lambda selector: tab.evaluate(f"document.querySelector('{selector}').getBoundingClientRect().left")
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=BROWSER, args=arguments)
        tab = browser.new_page()
        for width in (390, 1280, 1920):
            tab.set_viewport_size({"width": width, "height": 900})
            tab.goto((tmp_path / "report.html").as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            assert tab.evaluate(cut) == 0, "texts of charts stay inside their card"
            tab.evaluate("document.querySelector('.scroll').scrollLeft = 1e4")
            assert abs(left("#row-1 th") - left(".scroll")) < 2, "the first column stays"
        browser.close()


def test_report_needs_the_json_alone(result, tmp_path):
    (tmp_path / "compare.json").write_text(json.dumps(result))
    table = CliRunner().invoke(app, ["report", str(tmp_path), "--markdown"])
    assert table.exit_code == 0 and all(f"`{row['name']}`" in table.output for row in result["rows"])
    run = CliRunner().invoke(app, ["report", str(tmp_path / "compare.json"), "--html"])
    assert run.exit_code == 0 and (tmp_path / "report.html").read_text() == render_page(result)


@pytest.mark.parametrize(
    "content", ["", "[1]", "{}", '{"model": 1, "rows": [1], "prompts": 1, "schedule": 1, "device": 1}']
)
def test_report_refuses_what_is_no_result(tmp_path, content):
    (tmp_path / "compare.json").write_text(content)
    run = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert run.exit_code == 2 and "is not a result of" in run.output.replace("\n", " ")
    assert CliRunner().invoke(app, ["report", str(tmp_path / "nowhere")]).exit_code == 2


def test_rows_name_the_settings_that_their_density_is_solved_to(result):
    result["rows"][0] |= {
        "resolved": {"8x16x16": "radial(decay=0.0001)"},
        "density_note": "refreshes compute all pairs",
    }
    note = "solved to radial(decay=0.0001) on 8x16x16; refreshes compute all pairs"
    assert note in compare_table(result) and note in render_page(result)


def test_pairs_with_pooled_terms_are_shown_next_to_the_density(result):
    rows = [result["rows"][0], result["rows"][1] | {"tail_density": 0.047}, result["rows"][2] | {"tail_density": 0.0}]
    _, _, _, tail, plain, *_ = compare_table(result | {"rows": rows}).splitlines()
    assert {" + 0.05 |" in tail, " + 0.05 |" in plain} == {True, False}


def test_seeds_after_the_first_are_named(result):
    assert "2 seeds each (1 to 2)" in compare_table(result | {"seeds": 2, "first_seed": 1})
    assert "2 seeds each," in compare_table(result | {"seeds": 2})
