"""The page of all methods: facts read from docstrings, pictures of masks, measured numbers."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from dit_sparse import METHODS, Grid, Plan, Site, prepare
from dit_sparse.bundled import BUNDLED
from dit_sparse.eval.analysis import mask_gallery
from dit_sparse.eval.report import method_page, tables
from dit_sparse.eval.report.method_catalog import differences, method_rows, needs, paper
from dit_sparse.eval.report.tables import ROOT
from dit_sparse.generation.generate import load_pipeline
from dit_sparse.methods import KINDS

CALL = {"num_inference_steps": 4, "num_frames": 2, "height": 32, "width": 32, "guidance_scale": 1.0}
DOC = """Name: what it does. More.

Source: the first part of A. Beta-Gamma, C. D. Delta and E. Zeta et al., "A Title:
With a Part", arXiv:2501.12345, sec. 2; F. Eta, "Other", arXiv:1234.56789.

Planning: N D
multiply-adds.

Differs from the authors:
- One
  thing.
- Another - thing.

More.
"""


def test_facts_of_a_docstring():
    assert paper(DOC) == {
        "title": "A Title: With a Part",
        "authors": "A. Beta-Gamma, C. D. Delta and E. Zeta et al.",
        "arxiv": "2501.12345",
        "url": "https://arxiv.org/abs/2501.12345",
    }
    assert differences(DOC) == ["One thing.", "Another - thing."]
    assert differences("Differs from the authors: in\none thing.") == ["in one thing."]
    assert paper('B. Theta, "Name" (N), arXiv:2501.12345')["title"] == "Name"
    assert paper("Name, arXiv:2501.12345")["url"] == "https://arxiv.org/abs/2501.12345"
    assert paper("See https://a.org/b/c.")["url"] == "https://a.org/b/c"


@pytest.mark.parametrize("row", method_rows(), ids=lambda row: row["name"])
def test_every_method_states_its_facts(row):
    assert row["differences"] and all(text[-1] in ".)" for text in row["differences"]), row["differences"]
    assert row["planning"].endswith("."), "the docstring has no line `Planning: ...`"
    assert 20 < len(row["summary"]) <= 130, "one line of the README and of `dit-sparse methods`"
    assert (ROOT / "dit_sparse" / row["file"]).exists()


def test_needs_are_those_of_the_class():
    assert needs(METHODS["pooled"]) == ["log-sum-exp"] and needs(METHODS["svg2"]) == []


def test_page_has_a_section_for_every_method():
    text = (ROOT / "docs" / "methods.md").read_text()
    assert re.findall(r"^### (\w+)$", text, re.MULTILINE) == list(METHODS)
    links = re.findall(r"docs/methods.md#(\w+)\)", method_page.kind_table())
    assert links == list(METHODS)


def test_measured_numbers_are_those_of_the_results(tmp_path, monkeypatch):
    planning = [
        {"method": "radial", "static": True, "first": 0.0, "later": 0.0, "rounds": 3},
        {"method": "asa", "static": False, "first": 0.0312, "later": 0.03119, "rounds": 3},
        {"method": "sparsed", "static": False, "first": 0.12, "later": 0.0, "rounds": 3},
        {"method": "pbs", "why_not": "no memory"},
    ]
    result = {"rows": planning, "tokens": 128, "grid": "2x8x8", "heads": 1, "dim": 64, "density": 0.25}
    result |= {"device": "CPU", "versions": {"torch": "2"}, "commit": "abc"}
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "planning.json").write_text(json.dumps(result))
    stored = json.loads((ROOT / "eval" / "results" / "cpu" / "compare.json").read_text())
    (tmp_path / "cpu" / "compare.json").write_text(json.dumps(stored))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert method_page._planning_shares() == {"radial": "once", "asa": "3.1%", "sparsed": "12.0%, later 0.0%"}
    (row,) = [row for row in stored["rows"] if row["name"] == "asa 0.25"]
    low, high = row["psnr"]["interval"]
    cell = f"{row['psnr']['mean']:.1f} [{low:.1f}, {high:.1f}]"
    assert method_page._fidelity()["asa", 0.25] == cell
    assert cell in method_page.kind_section("scorer") and "128 tokens (2x8x8)" in method_page.method_conditions()


# --- pictures


def test_panel_holds_shares_of_pairs_and_the_keys_of_the_middle_query():
    grid = Grid(2, 4, 8, before=5)
    keep = torch.rand(1, 2, 9, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    plan = Plan.from_mask(keep, grid.tokens, 8)
    drawn = mask_gallery.panel("x", plan, Site(grid, 8), head=1)
    mask = plan.token_mask(torch.arange(grid.tokens))[0, 1][5:, 5:].double().numpy()
    assert drawn.pairs.shape == (8, 8) and drawn.keys.shape == (2, 4, 8) and drawn.query == 1 * 32 + 2 * 8 + 4
    assert drawn.pairs[3, 6] == pytest.approx(mask[24:32, 48:56].mean())
    assert np.array_equal(drawn.keys.flatten(), mask[drawn.query])


def test_pictures_show_the_plan_of_the_chosen_call(tmp_path):
    pipe = prepare(load_pipeline(BUNDLED))
    plan, site = mask_gallery.capture_plan(pipe, "asa", CALL, layer=2, step=3)
    assert (site.layer, site.step) == (2, 3) and plan.density < 0.5
    assert pipe.sparse_run is None
    with pytest.raises(RuntimeError, match="no sparse call"):
        mask_gallery.capture_plan(pipe, "asa", CALL, layer=2, step=4)
    mask_gallery.draw(["layout"], tmp_path, CALL, layer=0, step=1)
    with Image.open(tmp_path / "layout.png") as image:
        assert image.text["Methods"].split(",") == list(KINDS["layout"]) and image.width > 900


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_has_a_picture(kind):
    with Image.open(ROOT / "docs" / "images" / "methods" / f"{kind}.png") as image:
        drawn = image.text["Methods"].split(",")
    missing = set(KINDS[kind]) - {"dense"} - set(drawn)
    assert not missing, f"run python -m dit_sparse.eval.analysis.mask_gallery {kind}"
