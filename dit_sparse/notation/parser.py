"""Parser of the text form of methods.

    method    = term { "|" term }
    term      = NAME [ "(" [ argument { "," argument } ] ")" ] | "profile:" PATH | "(" method ")"
    argument  = [ NAME "=" ] value
    value     = NUMBER | STRING | WORD | "true" | "false" | "none" | "(" [ value { "," value } ] ")" | method

Examples: ``radial(sink=true)|sink``, ``cached(svg2, replan_interval=3)``, ``asa(budget=mass(0.9, min_ratio=0.1))``,
``neighborhood(stride=(1, 2, 2))``, ``my_module:MyMethod(density=0.2)``, ``profile:wan2.1-14b``,
``profile:"my profiles/a, b.json"``, ``seer(weights=shapes-wan)``. A WORD, with hyphens or slashes, is a string
without quotes. A preset such as ``balanced`` is replaced by its method.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from ..grid import short_repr
from .presets import PRESETS
from .syntax import BARE_PATH, QUOTED, Call, Node, ProfileName, UnionNode

MAX_DEPTH = 32
CONSTANTS = {"true": True, "false": False, "none": None}

_TOKEN = re.compile(
    rf"""(?P<space>\s+)
    |(?P<profile>profile:(?:\s*(?:{QUOTED})|{BARE_PATH})?)
    |(?P<string>{QUOTED})
    |(?P<number>[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|inf)(?![\w.]))
    |(?P<word>[a-z_][\w.]*(?:[-/][\w.]+)+|\.{{0,2}}/[\w./-]+)
    |(?P<name>[a-z_][\w.]*(?::[a-z_]\w*)?)
    |(?P<sign>[(),=|])""",
    re.VERBOSE | re.ASCII | re.IGNORECASE,
)


def parse(text: str) -> Node:
    """Return the syntax tree of a method. Raises ValueError with the position of a syntax error."""
    parser = _Parser(text, "method")
    node = parser.value(0)
    return parser.finish(node) if isinstance(node, Node) else parser.fail("expected a method", 0)


def parse_value(text: str) -> Any:
    """Return the value of a setting: a number, constant, string, tuple or syntax tree. Raises as `parse`."""
    parser = _Parser(text, "value")
    return parser.finish(parser.value(0))


class _Parser:
    """Recursive descent over tokens ``(kind, text, position)``."""

    def __init__(self, text: str, kind: str) -> None:
        if not isinstance(text, str):
            raise ValueError(f"a {kind} must be a text, got {short_repr(text)}")
        self.text, self.kind, self.at = text, kind, 0
        self.tokens = list(self._tokenize())

    def _tokenize(self) -> Iterator[tuple[str, str, int]]:
        position = 0
        while position < len(self.text):
            token = _TOKEN.match(self.text, position)
            if token is None:
                self.fail("unexpected character or unclosed string", position)
            if token.lastgroup != "space":
                yield token.lastgroup, token[0], position
            position = token.end()
        yield "end", "", len(self.text)

    def fail(self, reason: str, position: int) -> NoReturn:
        excerpt = self.text if len(self.text) <= 60 else f"{self.text[:57]}..."
        raise ValueError(f"cannot read the {self.kind} {excerpt!r}: {reason} (character {position + 1})")

    def take(self, sign: str) -> bool:
        """Consume the next token if it is this sign."""
        matches = self.tokens[self.at][:2] == ("sign", sign)
        self.at += matches
        return matches

    def finish(self, value: Any) -> Any:
        kind, _, position = self.tokens[self.at]
        return value if kind == "end" else self.fail("expected the end of the text", position)

    def value(self, depth: int) -> Any:
        position = self.tokens[self.at][2]
        if depth > MAX_DEPTH:
            self.fail(f"nested more than {MAX_DEPTH} levels deep", position)
        first = self.term(depth)
        if not self.take("|"):
            return first
        rest = self.value(depth + 1)
        joinable = isinstance(first, Node) and isinstance(rest, Node)
        return UnionNode(first, rest) if joinable else self.fail("only methods can be joined with |", position)

    def term(self, depth: int) -> Any:
        kind, text, position = self.tokens[self.at]
        self.at += kind != "end"
        if kind == "number":
            return self.number(text, position)
        if kind == "string":
            return self.string(text, position)
        if kind == "word":
            return text
        if kind == "profile":
            name = text.partition(":")[2].strip()
            name = self.string(name, position) if name.startswith(('"', "'")) else name
            return ProfileName(name) if name else self.fail("expected the name or path of a profile", position)
        if kind == "name" and self.take("("):
            return self.call(Call(text, *self.arguments(depth + 1)), position)
        if kind == "name":
            return CONSTANTS[text.lower()] if text.lower() in CONSTANTS else self.call(Call(text), position)
        if text == "(":
            values, ends_with_comma = self.items(lambda: self.value(depth + 1))
            return tuple(values) if len(values) != 1 or ends_with_comma else values[0]
        self.fail(f"expected a {self.kind if self.at < 2 else 'value'}", position)

    def call(self, call: Call, position: int) -> Call:
        """Return a call, with the method and settings of a preset in place of its name."""
        if call.name not in PRESETS:
            return call
        if call.positional:
            self.fail(f"{call.name} is a preset, whose settings are written NAME=VALUE", position)
        method = parse(PRESETS[call.name].method)
        return Call(method.name, method.positional, tuple((dict(method.settings) | dict(call.settings)).items()))

    def arguments(self, depth: int) -> tuple[tuple, tuple[tuple[str, Any], ...]]:
        positional, settings = [], {}

        def read_argument() -> None:
            kind, key, position = self.tokens[self.at]
            if kind == "name" and self.tokens[self.at + 1][1] == "=":
                self.at += 2
                if key in settings:
                    self.fail(f"{key} is given twice", position)
                settings[key] = self.value(depth)
            elif settings:
                self.fail("expected NAME=VALUE", position)
            else:
                positional.append(self.value(depth))

        self.items(read_argument)
        return tuple(positional), tuple(settings.items())

    def items(self, read: Callable[[], Any]) -> tuple[list, bool]:
        """Read items up to ``)``; return them and whether a comma follows the last one."""
        items, comma = [], True
        while not self.take(")"):
            if not comma:
                self.fail("expected ',' or ')'", self.tokens[self.at][2])
            items.append(read())
            comma = self.take(",")
        return items, comma

    def number(self, text: str, position: int) -> int | float:
        if not text.lstrip("+-").isdigit():
            return float(text)
        small = len(text) <= 20 and -(2**63) <= int(text) < 2**63
        return int(text) if small else self.fail("the number does not fit into 64 bits", position)

    def string(self, text: str, position: int) -> str:
        try:
            return text[1:-1] if text[0] == "'" else json.loads(text)
        except ValueError:
            self.fail("the string has an invalid escape sequence", position)
