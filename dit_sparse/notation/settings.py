"""Checks of the settings of methods and budgets: their types, from the annotations of the dataclasses, and ranges."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from functools import lru_cache
from numbers import Integral, Real
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from ..grid import short_repr
from .parser import parse_value
from .syntax import Call, Node, write

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", type(None): "none"}

MAX_LISTED = 160  # characters of a list of names in a message

Build = Callable[[Node, type], Any]


@dataclass(frozen=True)
class Range:
    """Numbers that a setting may have.

    Attributes:
        text: the range in words, for messages.
        contains: whether a number lies in it.
    """

    text: str
    contains: Callable[[int | float], bool]

    @classmethod
    def interval(cls, text: str) -> Range:
        """Return an interval such as ``(0, 1]`` or ``[1, inf)``."""
        left, low, high, right = re.fullmatch(r"([(\[])(.+), (.+)([)\]])", text).groups()
        low, high = float(low), float(high)
        above = (lambda value: value >= low) if left == "[" else (lambda value: value > low)
        below = (lambda value: value <= high) if right == "]" else (lambda value: value < high)
        return cls(f"in {text}", lambda value: above(value) and below(value))


POWER_OF_TWO = Range("a power of two in [1, 256]", lambda value: value in {1 << n for n in range(9)})
FINITE = Range("finite", math.isfinite)


def within(interval: str | Range, default: Any = MISSING, **other: str) -> Any:
    """Return a dataclass field whose numbers must lie in an interval.

    Args:
        interval: such as ``(0, 1]``, of every number of the setting.
        default: of the field.
        other: ``float="(0, 1]"``: another interval for numbers of that type.
    """
    ranges = {"": interval, **other}
    ranges = {name: one if isinstance(one, Range) else Range.interval(one) for name, one in ranges.items()}
    return field(default=default, metadata={"ranges": ranges})


def check_fields(instance: Any) -> None:
    """Check types and ranges of the fields of a frozen dataclass, and give whole numbers and lists the types of their
    fields, float and tuple.

    Fields whose annotation is neither a plain type, a class, nor a tuple of those are not checked.

    Raises:
        ValueError: a value has the wrong type or lies outside of its range.
    """
    hints = _hints_or_none(type(instance))
    for one in fields(instance):
        value = getattr(instance, one.name)
        if one.name in hints and _is_checkable(hints[one.name]):
            try:
                converted = _convert(value, hints[one.name], None)
            except _Mismatch:
                raise ValueError(f"{one.name} must be {_describe(hints[one.name])}, got {_shorten(value)}") from None
            if converted is not value:
                object.__setattr__(instance, one.name, converted)
            _check_range(one.name, converted, one.metadata.get("ranges", {}))


def _check_range(name: str, value: Any, ranges: dict[str, Range]) -> None:
    """Raise ValueError if a number, or one of a tuple of numbers, lies outside of its range."""
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool) or not isinstance(number, Real):
            continue
        allowed = ranges.get(type(number).__name__, ranges.get("", FINITE))
        if not allowed.contains(number):
            raise ValueError(f"{name} must be {allowed.text}, got {_shorten(value)}")


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
            given = _shorten(write(value) if isinstance(value, Node) else value)
            raise ValueError(f"{key} of {name} must be {_describe(hints[key])}, got {given}") from None
    return checked


@lru_cache
def field_types(cls: type) -> dict[str, Any]:
    """Names and types of the fields of a dataclass, in their order."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _hints_or_none(cls: type) -> dict[str, Any]:
    """Return `field_types`, or none of them if an annotation cannot be evaluated, as names inside functions."""
    try:
        return field_types(cls)
    except NameError:
        return {}


def _types(hint: Any) -> tuple:
    """The types of a union, or the type alone."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is_checkable(hint: Any) -> bool:
    if get_origin(hint) is tuple:
        return all(part is ... or _is_checkable(part) for part in get_args(hint))
    types = _types(hint)
    if len(types) > 1:
        return all(map(_is_checkable, types))
    return isinstance(hint, type) and get_origin(hint) is None and hint is not Any


def alternatives_to(word: str, known: Collection[str], listed: Collection[str] | None = None) -> str:
    """Return the end of a message about an unknown word: the closest known word, or else the list of them."""
    match = get_close_matches(word.lower(), known, 1)
    if match:
        return f"did you mean {match[0]!r}?"
    names = ", ".join(known if listed is None else listed)
    return f"there are {names if len(names) <= MAX_LISTED else names[:MAX_LISTED].rpartition(',')[0] + ', ...'}"


def _convert(value: Any, hint: Any, build: Build | None) -> Any:
    types = _types(hint)
    classes = [one for one in types if isinstance(one, type) and get_origin(one) is None and one not in WORDS]
    if build and isinstance(value, str) and str not in types and classes:
        value = parse_value(value)
    if isinstance(value, Call) and str in types and not value.positional and not value.settings:
        return value.name  # a string without quotes
    if build and isinstance(value, Node):
        return build(value, classes[0]) if classes else _mismatch()
    if type(value) in types or any(isinstance(value, one) for one in classes):
        return value
    if not isinstance(value, bool):
        if int in types and isinstance(value, Integral):
            return int(value)
        if float in types and isinstance(value, Real):
            return _to_float(value)
    for one in types:
        if get_origin(one) is tuple and isinstance(value, tuple | list):
            return _convert_tuple(value, get_args(one), build)
    return _mismatch()


def _to_float(value: Real) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number beyond the range of floats
        return _mismatch()


def _convert_tuple(value: tuple | list, parts: tuple, build: Build | None) -> tuple:
    parts = parts[:1] * len(value) if parts[1:] == (...,) else parts
    if len(parts) != len(value):
        return _mismatch()
    converted = tuple(_convert(one, part, build) for one, part in zip(value, parts, strict=True))
    same = isinstance(value, tuple) and all(new is old for new, old in zip(converted, value, strict=True))
    return value if same else converted


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
    if "Method" in names:
        return "a method"
    return WORDS.get(hint) or ("a budget such as top(0.2)" if hint.__module__.endswith("budget") else f"a {names[0]}")


def _shorten(value: Any) -> str:
    """Return a value for a message; constants as methods are written."""
    text = write(value) if value is None or isinstance(value, bool) else short_repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
