"""Type checks of the settings of methods and budgets, against the fields of their dataclasses."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import fields
from difflib import get_close_matches
from functools import lru_cache
from numbers import Integral, Real
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from .parser import parse_value
from .syntax import Node, write

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", type(None): "none"}

Build = Callable[[Node, type], Any]


class _Mismatch(Exception):
    """A value does not have the type of its field."""


def _mismatch() -> NoReturn:
    raise _Mismatch


def check_settings(name: str, cls: type, settings: dict[str, Any], build: Build) -> dict[str, Any]:
    """Return the settings with the types of the fields of a dataclass: nested methods and budgets built, whole numbers
    as floats where the field is a float.

    Args:
        name: of the method or budget, for messages.
        cls: its dataclass.
        settings: plain values, syntax trees, or strings that hold the text of a nested method or budget.
        build: ``build(node, base)`` returns the instance of ``base`` that a syntax tree describes.

    Raises:
        ValueError: a setting is unknown or has the wrong type.
    """
    hints = field_types(cls)
    checked = {}
    for key, value in settings.items():
        if key not in hints:
            raise ValueError(f"{name} has no setting {key[:60]!r}; {alternatives_to(key, hints)}")
        try:
            checked[key] = _convert(value, hints[key], build)
        except _Mismatch:
            given = repr(write(value)) if isinstance(value, Node) else repr(value)
            raise ValueError(f"{key} of {name} must be {_describe(hints[key])}, got {given[:60]}") from None
    return checked


@lru_cache
def field_types(cls: type) -> dict[str, Any]:
    """Names and types of the fields of a dataclass, in their order."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _types(hint: Any) -> tuple:
    """The types of a union, or the type alone."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def alternatives_to(word: str, known: Collection[str], listed: Collection[str] | None = None) -> str:
    """Return the end of a message about an unknown word: the closest known word, or else the list of them."""
    match = get_close_matches(word.lower(), known, 1)
    return f"did you mean {match[0]!r}?" if match else f"there are {', '.join(known if listed is None else listed)}"


def _convert(value: Any, hint: Any, build: Build) -> Any:
    types = _types(hint)
    classes = [one for one in types if isinstance(one, type) and get_origin(one) is None and one not in WORDS]
    if isinstance(value, str) and str not in types and classes:
        value = parse_value(value)
    if isinstance(value, Node):
        return build(value, classes[0]) if classes else _mismatch()
    if type(value) in types or any(isinstance(value, one) for one in classes):
        return value
    if not isinstance(value, bool):
        if int in types and isinstance(value, Integral):
            return int(value)
        if float in types and isinstance(value, Real):
            return float(value)
    for one in types:
        if get_origin(one) is tuple and isinstance(value, tuple | list):
            return _convert_tuple(value, get_args(one), build)
    return _mismatch()


def _convert_tuple(value: tuple | list, parts: tuple, build: Build) -> tuple:
    parts = parts[:1] * len(value) if parts[1:] == (...,) else parts
    if len(parts) != len(value):
        return _mismatch()
    return tuple(_convert(one, part, build) for one, part in zip(value, parts, strict=True))


def _describe(hint: Any) -> str:
    words = list(dict.fromkeys(map(_describe_one, _types(hint))))
    if {WORDS[int], WORDS[float]} <= set(words):
        words.remove(WORDS[int])
    return " or ".join(words)


def _describe_one(hint: Any) -> str:
    if get_origin(hint) is tuple:
        parts = get_args(hint)
        count = "a tuple of" if parts[1:] == (...,) else f"a tuple of {len(parts)}"
        return f"{count} values" + (f" (each {_describe(parts[0])})" if len({*parts} - {...}) == 1 else "")
    names = [one.__name__ for one in getattr(hint, "__mro__", ())]
    return WORDS.get(hint) or ("a method" if "Method" in names else "a budget such as top(0.2)")
