"""Examples of docs/extending run as they are written."""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import dit_sparse as ds
from dit_sparse.kernels import executors

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (ROOT / "docs" / "extending").glob("*.md") if path.stem != "index")


def code_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@functools.cache
def run_page(page: Path) -> ModuleType:
    """Run all blocks of a page in one module, as a reader who pastes them one after the other does."""
    name = f"example_{page.stem}"
    module = sys.modules[name] = ModuleType(name)  # dataclasses look their module up
    try:
        torch.manual_seed(0)
        for number, block in enumerate(code_blocks(page), 1):
            exec(compile(block, f"{page.name}, block {number}", "exec"), vars(module))
    finally:
        del sys.modules[name]
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page):
    assert len(code_blocks(page)) >= 2
    run_page(page)


def test_the_executor_of_the_page_runs_by_name(monkeypatch):
    monkeypatch.setattr(executors, "EXECUTORS", (*executors.EXECUTORS, "loop"))
    loop = run_page(ROOT / "docs" / "extending" / "executor.md")
    monkeypatch.setitem(sys.modules, "dit_sparse.kernels.executors.loop", loop)
    q, k, v = torch.randn(3, 1, 2, 2 * 8 * 8, 16)
    attend = lambda name: ds.attention(q, k, v, grid=ds.Grid(2, 8, 8), method="radial", density=0.5, executor=name)
    torch.testing.assert_close(attend("loop"), attend("reference"), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="requires float32"):
        ds.attention(q.half(), k.half(), v.half(), grid=ds.Grid(2, 8, 8), method="radial", executor="loop")
