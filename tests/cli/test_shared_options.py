"""The options that all commands have: --config, --json, --quiet and --verbose, and progress without a terminal."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import typer
from typer.testing import CliRunner

from dit_sparse.cli import terminal
from dit_sparse.cli.main import app
from dit_sparse.cli.shared.command import CommandGroup, with_shared_options
from dit_sparse.cli.terminal import duration, progress_bars

SMALL = ("--grid", "3x9x10", "--density", "0.5", "--block", "32")


def run(*arguments: object, of: typer.Typer = app):
    return CliRunner().invoke(of, [str(argument) for argument in arguments])


def commands(command, path: tuple = ()) -> Iterator[tuple]:
    """Yield the words and the command of each command and subcommand."""
    if not hasattr(command, "commands"):
        yield path, command
    for name, one in getattr(command, "commands", {}).items():
        yield from commands(one, (*path, name))


@pytest.fixture
def file(tmp_path):
    def write(text: str, suffix: str = ".yaml"):
        path = tmp_path / f"options{suffix}"
        path.write_text(text)
        return path

    return write


def test_every_command_has_the_shared_options():
    found = dict(commands(typer.main.get_command(app)))
    assert len(found) > 15 and ("bench", "attention") in found
    for path, command in found.items():
        names = {name for parameter in command.params for name in parameter.opts}
        assert {"--config", "--json", "--quiet", "--verbose"} <= names, path


def test_an_own_option_must_not_bear_the_name_of_a_shared_one():
    def command(quiet: bool = False) -> None: ...

    with pytest.raises(ValueError, match="a parameter quiet"):
        with_shared_options(command)


@pytest.mark.parametrize(
    ("text", "suffix"),
    [
        ("grid: 3x9x10\ndensity: 0.5\nblock: 32\n", ".yaml"),
        ('grid = "3x9x10"\ndensity = 0.5\nblock = 32\n', ".toml"),
        ("grid: 1x1x1\ndensity: 0.5\nshow:\n  grid: 3x9x10\n  block: 32\ncompare:\n  prompts: 4\n", ".yml"),
        ('[show]\ngrid = "3x9x10"\ndensity = 0.5\nblock = 32\n[bench.attention]\nheads = 1', ".toml"),
    ],
    ids=["yaml", "toml", "yaml with tables", "toml with tables"],
)
def test_options_of_a_file_are_those_of_the_command_line(file, text, suffix):
    expected, found = run("show", "radial", *SMALL), run("show", "radial", "--config", file(text, suffix))
    assert found.exit_code == 0 and found.output == expected.output, found.output


def test_options_of_the_command_line_take_precedence(file):
    path = file("method: window\ngrid: 3x9x10\ndensity: 0.9\nblock: 32\n")
    assert run("show", "radial", "-d", 0.5, "--config", path).output == run("show", "radial", *SMALL).output
    assert run("show", "--config", path).output.splitlines()[-1].startswith("window  3x9x10")


def test_values_of_a_file_have_the_types_of_the_options(file):
    listed = json.loads(run("methods", "--config", file("kind: [scorer, layout]\njson: true")).output)
    assert {row["kind"] for row in listed} == {"scorer", "layout"}
    listed = json.loads(run("methods", "--config", file('names = ["sol", "radial"]\njson = true', ".toml")).output)
    assert {row["name"] for row in listed} == {"sol", "radial"}
    refused = run("show", "radial", "--config", file("dense_steps: 0.5\nblock: x"))
    assert refused.exit_code == 2 and "dense-steps" in refused.stderr
    refused = run("show", "radial", "--config", file("block: x"))
    assert refused.exit_code == 2 and "--block" in refused.stderr


@pytest.mark.parametrize(
    ("text", "suffix", "words"),
    [
        ("gird: 3x9x10", ".yaml", "no option 'gird' of root show; did you mean 'grid'?"),
        ("show:\n  blok: 32", ".yaml", "no option 'blok' of root show; did you mean 'block'?"),
        ("shwo:\n  block: 32", ".yaml", "there is no command 'shwo'; did you mean 'show'?"),
        ("config: other.yaml", ".yaml", "there is no option 'config'"),
        ("block: 32", ".ini", "--config must end in .yaml, .yml, .toml, got"),
        ("block = ", ".toml", "cannot read"),
        ("block: [32", ".yaml", "cannot read"),
        ("- block", ".yaml", "must hold options such as density: 0.25"),
        ("show:\n  block: {a: 1}", ".yaml", "must be a value or a list of values"),
        ("[" * 5000, ".yaml", "cannot read"),
    ],
)
def test_a_wrong_file_is_one_sentence(file, text, suffix, words):
    refused = run("show", "radial", "--config", file(text, suffix))
    assert refused.exit_code == 2 and words in refused.stderr, refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_json_is_the_only_output():
    result = json.loads(run("show", "radial", *SMALL, "--json").stdout)
    assert result["grid"] == "3x9x10" and 0 < result["density"] <= 1 and result["block"] == 32
    assert json.loads(run("methods", "radial", "--json", "--quiet").stdout)[0]["name"] == "radial"


def test_quiet_leaves_errors():
    assert run("show", "radial", *SMALL, "--quiet").output == ""
    assert "no method 'radail'" in run("show", "radail", "-q").stderr
    assert run("show", "radial", *SMALL).output, "only the command with --quiet is quiet"
    assert "cannot be combined" in run("show", "radial", "-q", "-v").stderr


def group(function) -> CommandGroup:
    made = CommandGroup()
    made.command()(function)
    made.command("other")(lambda: None)
    return made


def test_the_log_is_printed_by_level():
    def work() -> None:
        for level in (logging.DEBUG, logging.INFO, logging.WARNING):
            logging.getLogger("dit_sparse.part").log(level, "at level %s", level)

    lines = lambda *options: run("work", *options, of=group(work)).stderr.splitlines()
    assert lines() == ["at level 20", "at level 30"] and lines("-q") == ["at level 30"]
    assert lines("--verbose") == ["at level 10", "at level 20", "at level 30"]
    assert not logging.getLogger("dit_sparse").handlers


def test_verbose_shows_the_traceback():
    def fail() -> None:
        with terminal.one_sentence():
            raise TypeError("unexpected")

    assert run("fail", of=group(fail)).stderr.splitlines() == ["dit-sparse: TypeError: unexpected"]
    assert "Traceback" in run("fail", "-v", of=group(fail)).stderr


def test_progress_in_a_file_is_a_line_per_tenth_and_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with progress_bars() as stage:
        progress = stage("denoising")
        for done in range(51):
            now[0] = 2.0 * done
            progress(done, 50)
        progress = stage("clips (steps)")
        for done in range(21):
            now[0] = 100 + 50.0 * done
            progress(done, 400)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["denoising ...", "denoising: 5 of 50, 90 s left"] and lines[10] == "denoising: 50 of 50"
    assert lines[11:13] == ["clips (steps) ...", "clips (steps): 2 of 400, 5 h 32 min left"] and len(lines) == 22
    assert duration(90 * 60) == "1 h 30 min" and duration(600) == "10 min"
