"""Which sparse rows dense attention with fewer steps beats, and notes on times of a busy machine."""

from __future__ import annotations

import json
import os

import pytest
from typer.testing import CliRunner

from dit_sparse.cli.main import app
from dit_sparse.cli.terminal import warn_if_busy
from dit_sparse.eval.report.comparison_tables import completeness_notes
from dit_sparse.eval.report.fewer_steps import fewer_steps_note
from dit_sparse.eval.report.tables import RESULTS
from dit_sparse.output.environment import busy_warning, conditions, machine_load


def row(method: str, psnr: float | None, speedup: float, steps: int = 8, **other: object) -> dict:
    return {
        "name": f"{method} 0.25",
        "method": method,
        "psnr": {"mean": psnr},
        "speedup": speedup,
        "steps": steps,
    } | other


REFERENCE = {"name": "dense", "method": "dense", "psnr": None, "speedup": 1.0, "steps": 8}
SIX, SEVEN = row("dense", 27.0, 1.4, 6), row("dense", 30.0, 1.2, 7)


@pytest.mark.parametrize(
    ("sparse", "beaten"),
    [
        (row("a", 26.9, 1.4), "6 steps"),
        (row("a", 27.0, 1.4), "6 steps"),
        (row("a", 27.1, 1.4), None),
        (row("a", 27.0, 1.41), None),
        (row("a", 25.0, 1.1), "7 steps"),
        (row("a", 30.0, 1.2), "7 steps"),
        (row("a", None, 1.1), None),
        (row("random_blocks", 20.0, 1.3), None),
        (row("a", 20.0, 1.3, device="another"), None),
    ],
)
def test_a_row_is_beaten_by_more_fidelity_in_no_more_time(sparse, beaten):
    """If several numbers of steps beat it, the one with the highest PSNR is named."""
    note = fewer_steps_note([REFERENCE, sparse, SIX, SEVEN])
    if beaten is None:
        assert note == "Dense attention with fewer steps beats no sparse row at equal or lower time."
    else:
        assert f"with {beaten} (" in note and note.endswith("beats a 0.25.")


def test_without_fewer_steps_nothing_is_said():
    assert fewer_steps_note([REFERENCE, row("a", 20.0, 1.3)]) == ""


def test_the_report_says_so_in_the_terminal_and_on_the_page(tmp_path):
    result = json.loads((RESULTS / "cpu" / "compare.json").read_text())
    (tmp_path / "compare.json").write_text(json.dumps(result))
    note = fewer_steps_note(result["rows"])
    shown = CliRunner().invoke(app, ["report", str(tmp_path)]).output
    assert note in " ".join(shown.split()) and max(map(len, shown.splitlines())) <= 80
    assert note in CliRunner().invoke(app, ["report", str(tmp_path), "--markdown"]).output
    assert CliRunner().invoke(app, ["report", str(tmp_path), "--html"]).exit_code == 0
    assert note in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("average", "busy"), [(0.5, False), (2.0, False), (2.1, True)])
def test_times_of_a_busy_machine_carry_a_warning(average, busy, monkeypatch, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (average, 0.0, 0.0), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert conditions()["load"] == {"average": average, "cores": 2}
    warn_if_busy(conditions())
    assert ("times are not reliable" in capsys.readouterr().err) == busy
    notes = completeness_notes({"rows": [row("a", 20.0, 1.3, busy_clips=int(busy))], "commit": None})
    assert any("Times of a 0.25 are not reliable" in note for note in notes) == busy


def test_a_system_without_a_load_average_has_no_warning(monkeypatch):
    monkeypatch.delattr(os, "getloadavg", raising=False)
    assert machine_load() is None and busy_warning(None) is None
