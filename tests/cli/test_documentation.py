"""Commands in the documentation: they exist, their options too, and the values can be read."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from dit_sparse import Grid, Scorer
from dit_sparse.cli.main import EXAMPLES, app
from dit_sparse.cli.options import count_or_fraction, method_list, numbers
from dit_sparse.eval.comparison.row_syntax import parse_row
from dit_sparse.methods import KINDS

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "profiles" / "README.md"]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))


@dataclass(frozen=True, kw_only=True)
class BlockMeans(Scorer):
    """Stands for the method of docs/extending/method.md."""

    sharpness: float = 1.0


@pytest.fixture(autouse=True)
def module_of_a_user(monkeypatch):
    """Modules that the documentation's commands import from the working folder."""
    module = ModuleType("my_methods")
    module.BlockMeans = BlockMeans
    monkeypatch.setitem(sys.modules, "my_methods", module)


def texts(pattern: str) -> list[str]:
    """Return the matches of a pattern in all documents, with line continuations joined."""
    flags = re.DOTALL | re.MULTILINE
    return [match for path in DOCUMENTS for match in re.findall(pattern, path.read_text().replace("\\\n", ""), flags)]


CODE_LINES = [line for block in texts(r"^```\w*\n(.*?)^```") for line in block.splitlines()]
INLINE = [re.sub(r"\s+", " ", text) for text in texts(r"`(dit-sparse [^`]+)`")]
COMMANDS = [line for line in CODE_LINES if re.match(r"dit-sparse |.* -m dit_sparse\.cli ", line)]
COMMANDS += [f"dit-sparse {example}" for example in EXAMPLES.values()]


def read_command(line: str) -> tuple[Any, list[str]]:
    """Return the command of a line, and its arguments."""
    words = shlex.split(line, comments=True)
    words = words[words.index("dit_sparse.cli" if "dit_sparse.cli" in words else "dit-sparse") + 1 :]
    words = words[: words.index(">")] if ">" in words else words
    command = typer.main.get_command(app)
    while hasattr(command, "commands") and words:
        assert words[0] in command.commands, f"no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def read_rows(text: str) -> None:
    for row in method_list(text):
        if row != "all":
            parse_row(row)


def read_kinds(text: str) -> None:
    assert set(text.split(",")) <= set(KINDS), text


READERS = {
    **dict.fromkeys(("method", "methods", "ablate", "candidates"), read_rows),
    "kind": read_kinds,
    "density": lambda value: all(0 < x <= 1 for x in numbers(str(value))) or pytest.fail(f"density {value}"),
    "dense_steps": count_or_fraction,
    "grid": Grid.parse,
}


def check(line: str) -> None:
    """Parse a command as the shell passes it, and read its values without running it."""
    command, words = read_command(line)
    with command.make_context("dit-sparse", words) as context:
        for name in READERS.keys() & context.params.keys():
            values = context.params[name]
            for value in values if isinstance(values, list | tuple) else [values]:
                if value is not None:
                    READERS[name](value)


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: line.split("#")[0].strip()[:60])
def test_commands_of_code_blocks_are_parsed(line):
    check(line)


@pytest.mark.parametrize("text", sorted(set(INLINE)))
def test_commands_in_sentences_exist(text):
    """A sentence may leave required arguments out."""
    command, words = read_command(text)
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word.split("=")[0] for word in words if word.startswith("-")} <= options


def test_modules_files_and_targets_exist():
    text = " ".join(path.read_text() for path in DOCUMENTS)
    for module in set(re.findall(r"-m\s+(dit_sparse[\w.]*)", text)):
        assert importlib.util.find_spec(module), module
    for name in set(re.findall(r"python ([\w/]+\.py)", text)):
        assert (ROOT / name).is_file(), name
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"(?:`|^)make (\w+)", text, re.M)) <= set(targets)


def test_documentation_is_read():
    """The patterns find the commands of every document that has some."""
    found = "\n".join([*COMMANDS, *INLINE])
    for words in ("compare", "report", "study", "reproduce", "profile", "eval video", "bench attention", "batch"):
        assert f"dit-sparse {words} " in found
    assert len(COMMANDS) > 30 and len(INLINE) > 10


@pytest.mark.parametrize(
    "line",
    [
        "dit-sparse compere", "dit-sparse bench atention", "dit-sparse compare --densities 0.2", "dit-sparse generate",
        "dit-sparse compare --methods radail", "dit-sparse compare --density 2", "dit-sparse demo --seed x",
    ],
)  # fmt: skip
def test_wrong_commands_are_noticed(line):
    usage_error = typer.BadParameter.__base__
    with pytest.raises((AssertionError, ValueError, usage_error, pytest.fail.Exception)):
        check(line)
