"""Methods from outside of the package: entry points and ``module:Class``."""

from __future__ import annotations

import sys
import textwrap

import pytest
import torch
from typer.testing import CliRunner

import dit_sparse as ds
from dit_sparse.cli.main import app
from dit_sparse.grid import Grid, Site
from dit_sparse.methods import method, method_text
from dit_sparse.notation import external

SOURCE = """
    from dataclasses import dataclass
    import dit_sparse as ds

    @dataclass(frozen=True, kw_only=True)
    class BlockMeans(ds.Scorer):
        power: float = 1.0

        def score(self, q, k, v, site, memory):
            from dit_sparse.scoring import pool
            return pool(q, site.block) @ pool(k, site.block).mT * self.power

    class Other: pass
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module and an installed distribution with an entry point, and return the module's name."""
    (tmp_path / "outside_methods.py").write_text(textwrap.dedent(SOURCE))
    info = tmp_path / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dit_sparse.methods]\nblock_means = outside_methods:BlockMeans\n")
    external.installed_methods.cache_clear()
    yield "outside_methods", tmp_path
    sys.modules.pop("outside_methods", None)
    external.installed_methods.cache_clear()


def test_an_entry_point_names_a_method(module, monkeypatch):
    monkeypatch.syspath_prepend(module[1])
    one = method("cached(block_means(power=2), replan_interval=3)", density=0.5)
    assert type(one.inner).__name__ == "BlockMeans" and one.inner.power == 2
    assert method(method_text(one)) == one and "block_means" in method_text(one)
    q = torch.randn(1, 2, 128, 8, generator=torch.Generator().manual_seed(0))
    plan = method("block_means", density=0.5).plan(q, q, q, Site(Grid(2, 8, 8), 16), {})
    assert plan.density == pytest.approx(0.5, abs=0.01)


def test_a_module_in_the_working_folder_is_imported_by_the_command_only(module, monkeypatch):
    name, folder = module
    text = f"{name}:BlockMeans(power=3.0)"
    with pytest.raises(ValueError, match="there is no method"):
        method(text)
    monkeypatch.chdir(folder)
    path = sys.path.copy()
    assert external.import_modules(text) == text and sys.path == path
    assert method(text).power == 3 and method_text(method(text)) == f"{name}:BlockMeans(power=3.0)"
    assert isinstance(ds.SparseAttnProcessor(text, density=0.3).settings.method, ds.Scorer)
    with pytest.raises(ValueError, match="there is no method"):
        method(f"{name}:Missing")
    with pytest.raises(ValueError, match="is not a class of sparse-attention methods"):
        method(f"{name}:Other")


@pytest.mark.parametrize("text", ["no_such_module:X", "json:Missing", "json:loads", "cached(no_such_module:X)"])
def test_the_command_says_what_cannot_be_imported(text):
    result = CliRunner().invoke(app, ["generate", "a red circle moves up", "--method", text])
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1 and text.strip("cahed()").split(":")[0] in result.stderr


def test_an_entry_point_that_fails_is_one_sentence(module, monkeypatch):
    (module[1] / "outside-1.0.dist-info" / "entry_points.txt").write_text("[dit_sparse.methods]\nx = nowhere:X\n")
    monkeypatch.syspath_prepend(module[1])
    with pytest.raises(ValueError, match="of an installed package cannot be loaded"):
        method("x")
