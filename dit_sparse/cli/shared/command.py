"""Commands that all have the options --config, --json, --quiet and --verbose."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ..terminal import output_options
from .config_file import read_config

SHARED = {
    "config": Annotated[
        Path | None,
        typer.Option(
            "--config",
            callback=read_config,
            is_eager=True,  # before other options, which then find their values
            help="A .yaml or .toml file with options of this command; options of the command line take precedence.",
        ),
    ],
    "json_output": Annotated[bool, typer.Option("--json", help="Print the result as JSON.")],
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings, errors and --json.")],
    "verbose": Annotated[bool, typer.Option("--verbose", "-v", help="Also print the log, and tracebacks of errors.")],
}
DEFAULTS = {"config": None, "json_output": False, "quiet": False, "verbose": False}


class CommandGroup(typer.Typer):
    """A group of commands. `command` adds the shared options to each of them.

    A command passes its result to `terminal.print_result`, which prints it if ``--json`` is given.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, **options)

    def command(self, name: str | None = None, **options: Any) -> Callable[[Callable], Callable]:
        register = super().command(name, **options)

        def add(function: Callable) -> Callable:
            register(with_shared_options(function))
            return function

        return add


def with_shared_options(function: Callable) -> Callable:
    """Return a command function with the shared options after its own ones. They hold while it runs."""

    @wraps(function)
    def command(*, config: Path | None, json_output: bool, quiet: bool, verbose: bool, **arguments: Any) -> Any:
        with output_options(json_output, quiet, verbose):
            return function(**arguments)

    own, hints = inspect.signature(function, eval_str=True), get_type_hints(function, include_extras=True)
    if overlap := own.parameters.keys() & SHARED.keys():
        raise ValueError(f"{function.__name__} has a parameter {overlap.pop()}, which all commands have")
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=DEFAULTS[name], annotation=annotation)
        for name, annotation in SHARED.items()
    ]
    command.__signature__ = own.replace(parameters=[*own.parameters.values(), *added])
    command.__annotations__ = hints | SHARED
    return command
