"""The page of all commands and options, from the command line itself."""

from __future__ import annotations

import typer
from typer.cli import get_docs_for_click

INTRODUCTION = """\
# Commands

All commands and their options, as `--help` prints them. [Using dit-sparse](../usage.md#command-line) has an example of
each.
"""


def command_page() -> str:
    """Return the Markdown of the page."""
    from dit_sparse.cli.main import app

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="dit-sparse"), name="dit-sparse")
    commands = text[text.index("## `dit-sparse") :]
    return f"{INTRODUCTION}\n{commands}"
