"""`bench tail`: its rows, plans and command."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from dit_sparse.cli.main import app
from dit_sparse.eval.bench import pooled_tail as bench


@pytest.mark.parametrize("key_tile", bench.KEY_TILES)
def test_plans_keep_the_density_in_every_row(key_tile):
    plan = bench.Problem(tokens=1024, density=0.25).plan(key_tile, "cpu")
    assert plan.density == pytest.approx(0.25) and (plan.count == 256 // key_tile).all()
    assert plan.key_sizes.max() == key_tile


def test_rows_hold_shares_of_a_dense_call(tmp_path):
    out, before = tmp_path / "tail.json", torch.get_num_threads()
    options = {"tokens": 256, "heads": 1, "seconds": 0, "threads": 1, "out": out}
    command = ["bench", "tail", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    stored = json.loads(out.read_text())
    rows = stored["rows"]
    assert [row["part"] for row in rows].count("tail") == 5
    assert {row["part"] for row in rows} == {"tail", "mass_and_spread", "pooling_error"}
    for row in rows:
        assert (row["tokens"], row["threads"], row["rounds"]) == (256, 1, 3) and row["dense_seconds"] > 0
        if row["part"] == "tail":
            assert row["arithmetic"] == pytest.approx(0.75 / row["tail"]) and row["kept_share"] > 0
        else:
            assert row["share_per_call"] == pytest.approx(row["share"] / 4)
    assert torch.get_num_threads() == before and "commit" in json.dumps(stored)
