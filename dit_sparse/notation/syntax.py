"""The syntax tree of a method's text, and its canonical text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

QUOTED = r'"(?:[^"\\\n]|\\.)*"' + r"|'[^'\n]*'"
BARE_PATH = r"[^\n,()|@\"']+"  # other paths of profiles are quoted


@dataclass(frozen=True)
class Call:
    """``name(positional, ..., key=value, ...)``: a method or a budget."""

    name: str
    positional: tuple = ()
    settings: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class UnionNode:
    """``first|rest``: the union of patterns."""

    first: Node
    rest: Node


@dataclass(frozen=True)
class ProfileName:
    """``profile:name``: a head profile, by its name or path."""

    name: str


Node = Call | UnionNode | ProfileName


def write(value: Any) -> str:
    """Return the text of a syntax tree or of a plain value; the parser reads it back."""
    if isinstance(value, UnionNode):
        first = f"({write(value.first)})" if isinstance(value.first, UnionNode) else write(value.first)
        return f"{first}|{write(value.rest)}"
    if isinstance(value, ProfileName):
        bare = re.fullmatch(BARE_PATH, value.name) and value.name == value.name.strip()
        return f"profile:{value.name if bare else json.dumps(value.name)}"
    if isinstance(value, Call):
        arguments = [*map(write, value.positional), *(f"{key}={write(part)}" for key, part in value.settings)]
        return f"{value.name}({', '.join(arguments)})" if arguments else value.name
    if isinstance(value, tuple):
        return f"({', '.join(map(write, value))}{',' * (len(value) == 1)})"
    if isinstance(value, str):
        return json.dumps(value)
    return str(value).lower() if value is None or isinstance(value, bool) else repr(value)


def nodes(value: Any) -> Iterator[Node]:
    """Yield every node of a syntax tree, the outermost first."""
    if isinstance(value, Node):
        yield value
    parts: tuple = value if isinstance(value, tuple) else ()
    if isinstance(value, UnionNode):
        parts = (value.first, value.rest)
    elif isinstance(value, Call):
        parts = (*value.positional, *(part for _, part in value.settings))
    for part in parts:
        yield from nodes(part)


def has_settings(node: Node) -> bool:
    """Return whether a text sets anything: it holds a setting or a profile."""
    return any(isinstance(one, ProfileName) or (isinstance(one, Call) and one.settings) for one in nodes(node))


def sets_density(node: Node) -> bool:
    """Return whether a text determines the density: it holds a density, a budget or a profile."""
    keys = {key for one in nodes(node) if isinstance(one, Call) for key, _ in one.settings}
    return bool(keys & {"density", "budget"}) or any(isinstance(one, ProfileName) for one in nodes(node))


def split_list(text: str, separator: str = ",") -> list[str]:
    """Split at separators outside parentheses and quotes; the parts are stripped."""
    parts, depth = [""], 0
    for piece in re.findall(rf"{QUOTED}|.", text, re.DOTALL):
        depth += (piece == "(") - (piece == ")")
        if piece == separator and depth <= 0:
            parts.append("")
        else:
            parts[-1] += piece
    return [part.strip() for part in parts]
