"""Tables of the commands fit 80 columns without cut names or headings, and the shell completes options."""

from __future__ import annotations

import pytest
from rich.console import Console
from typer.testing import CliRunner

from dit_sparse.cli import bench, compare, terminal
from dit_sparse.cli.main import app

NUMBERS = {"dense_seconds": 0.222, "dense": "sdpa", "seconds": 0.18256, "speedup": 10.31, "cost_per_block": 0.85}
NUMBERS |= {"tflops": 123.45, "planning_seconds": 0.0115, "permute_seconds": 0.001, "density": 0.25}
SHAPE = {"tokens": 75600, "head_dim": 128, "dtype": "bfloat16"}


@pytest.fixture
def output(monkeypatch):
    """What is printed to a terminal of 80 columns."""
    narrow = Console(width=80, record=True)
    for module in (bench, compare, terminal):
        monkeypatch.setattr(module, "console", narrow)
    return narrow.export_text


def check(text: str, *words: str) -> None:
    assert max(map(len, text.splitlines())) <= 80 and "\N{HORIZONTAL ELLIPSIS}" not in text
    for word in words:
        assert word in text, text


def test_executors_fit(output):
    bench._print_executors([NUMBERS | SHAPE | {"pattern": "random_blocks", "executor": "flashinfer_sparse"}] * 2)
    check(output(), "random_blocks 0.25", "flashinfer_sparse", "of ideal", "TFLOP/s", "182.56", "123.45")


def test_reproductions_fit(output):
    numbers = {"density": (0.3, 0.2999), "psnr": (23.9, 25.12), "ssim": (0.842, 0.8121), "lpips": (0.163, 0.1123)}
    rows = [{"row": "cached(rettention(subblock), replan_interval=3)"} | numbers | {"speedup": (1.77, 1.55)}]
    compare.console.print(compare._reproduction_table(rows))
    check(output(), "PSNR (dB)", "0.842 / 0.812", "1.77 / 1.55")


def test_long_names_are_folded(output):
    table = terminal.make_table("method", "first", "second", numbers=2)
    table.add_row("m" * 100, "0.1", "0.2")
    terminal.console.print(table)
    text = output()
    check(text, "first", "second")
    assert text.count("m") == 100 + len("method".replace("ethod", ""))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("gene", "generate"),
        ("generate --pre", "--preset"),
        ("bench attention --con", "--config"),
        ("app --q", "--quiet"),
        ("generate --preset ba", "balanced"),
        ("generate x -m rou", "routed"),
        ("generate --profile wan2.1-1", "wan2.1-1.3b"),
        ("demo --executor ga", "gather"),
        ("methods --kind sc", "scorer"),
        ("generate --dtype b", "bfloat16"),
        ("generate --offload se", "sequential"),
    ],
)
def test_the_shell_completes_commands_options_and_values(words, expected):
    line = f"dit-sparse {words}"
    environment = {"_DIT_SPARSE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    assert expected in CliRunner().invoke(app, [], env=environment, prog_name="dit-sparse").output
