"""Configuration files: the options of a command in YAML or TOML."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from ..terminal import one_sentence

FORMATS = (".yaml", ".yml", ".toml")
NOT_IN_FILES = ("help", "config")


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the options of a file the defaults of a command, as the callback of ``--config``.

    A file holds options by their long names, or a table of options for each command, such as ``[generate]`` and
    ``[bench.attention]`` in TOML. A list is joined by commas, or repeats an option that may be repeated.
    """
    if path is None or context.resilient_parsing:
        return path
    with one_sentence():
        options = _options_of(context, _read_file(path), path)
        parameters = _parameters(context)
        context.default_map = {
            parameters[name].name: _as_on_the_command_line(parameters[name], value, f"{name} in {path}")
            for name, value in options.items()
            if value is not None
        }
    return path


def _read_file(path: Path) -> dict:
    from dit_sparse.notation.reading import read_text, shorten_path

    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"--config must end in {', '.join(FORMATS)}, got {shorten_path(path)}")
    text = read_text(path)
    try:
        content = _parse_toml(text) if suffix == ".toml" else _parse_yaml(text)
    except RecursionError:
        raise ValueError(f"cannot read {shorten_path(path)}: it is nested too deep") from None
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot read {shorten_path(path)}: {reason[:200]}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{shorten_path(path)} must hold options such as density: 0.25")
    return content


def _parse_toml(text: str) -> dict:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    return tomllib.loads(text)  # raises a ValueError


def _parse_yaml(text: str) -> Any:
    import yaml

    try:
        return {} if (content := yaml.safe_load(text)) is None else content
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _options_of(context: typer.Context, content: dict, path: Path) -> dict[str, Any]:
    """Return the options of the command in a file, by their names in `_parameters`.

    Raises:
        ValueError: a name is neither an option of the command nor a command.
    """
    from dit_sparse.notation.settings import alternatives_to

    contexts = [context]
    while contexts[-1].parent is not None:
        contexts.append(contexts[-1].parent)
    commands = [each.command for each in reversed(contexts)]
    known = _parameters(context)
    options = {str(name).replace("_", "-"): value for name, value in _collect(content, commands, path).items()}
    for name in options:
        if name not in known:
            problem = f"there is no option {name[:60]!r} of {context.command_path}"
            raise ValueError(f"{path}: {problem}; {alternatives_to(name, known)}")
    return options


def _collect(content: dict, commands: list[Any], path: Path) -> dict:
    """Return the options of the last of nested commands: those outside of tables, and those in its own table."""
    from dit_sparse.notation.settings import alternatives_to

    subcommands = getattr(commands[0], "commands", None)
    if subcommands is None:
        return content
    for name, value in content.items():
        if isinstance(value, dict) and name not in subcommands:
            problem = f"there is no command {str(name)[:60]!r}"
            raise ValueError(f"{path}: {problem}; {alternatives_to(str(name), subcommands)}")
    options = {name: value for name, value in content.items() if not isinstance(value, dict)}
    return options | _collect(content.get(commands[1].name, {}), commands[1:], path)


def _parameters(context: typer.Context) -> dict[str, Any]:
    """Return the options of a command by their long names without dashes, and its arguments by their names."""
    parameters = {}
    for parameter in context.command.params:
        names = [name.removeprefix("--") for name in parameter.opts if name.startswith("--")]
        for name in names or [parameter.name.replace("_", "-")]:
            parameters[name] = parameter
    return {name: parameter for name, parameter in parameters.items() if name not in NOT_IN_FILES}


def _as_on_the_command_line(parameter: Any, value: Any, place: str) -> Any:
    """Return a value of a file as its text on the command line, or the list of texts of a repeated option."""
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(one, dict | list) for one in value)):
        raise ValueError(f"{place} must be a value or a list of values")
    repeated = getattr(parameter, "multiple", False) or parameter.nargs != 1
    texts = [_text(one) for one in (value if isinstance(value, list) else [value])]
    return texts if repeated else ",".join(texts)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
