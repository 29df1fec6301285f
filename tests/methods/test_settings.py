"""Settings are checked when a method is constructed, by the annotations and ranges of its fields."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, get_args

import numpy as np
import pytest

from dit_sparse import METHODS, Grid, Mass, Method, Top
from dit_sparse.methods import PARTS, method
from dit_sparse.methods.patterns.neighborhood import Neighborhood
from dit_sparse.methods.patterns.radial import Radial
from dit_sparse.methods.patterns.svg import SVG
from dit_sparse.notation.settings import POWER_OF_TWO, Range, check_fields, field_types, within

CLASSES = {name: cls for name, cls in (METHODS | PARTS).items() if name not in ("cached", "per_head")}
FIELDS = [(name, one) for name, cls in CLASSES.items() for one in fields(cls)]
every_field = pytest.mark.parametrize(("name", "one"), FIELDS, ids=lambda value: getattr(value, "name", value))


def refused(name: str, setting: str, value: Any) -> str:
    """Return the message for a setting, given as an object and as a setting of a text: one short sentence each."""
    messages = []
    for construct in (CLASSES[name], lambda **settings: method(name, **settings)):
        with pytest.raises(ValueError) as error:
            construct(**{setting: value})
        messages.append(str(error.value))
    for message in messages:
        assert setting in message and "\n" not in message and len(message) < 200, message
    return messages[0]


@every_field
def test_wrong_types_are_named(name, one):
    for value in ("x", (), b"1", object(), math.inf, math.nan, 2**2000, [1, 2, 3, 4], True, "0.5", None, 1j):
        hint = field_types(CLASSES[name])[one.name]
        types = get_args(hint) or (hint,)
        if type(value) in types or (isinstance(value, str) and one.name in ("inner", "budget")):
            continue  # a text names a method or a budget
        assert f"{one.name} must be " in refused(name, one.name, value)


@every_field
def test_values_out_of_range_are_named(name, one):
    """Every range is finite on the side where greater numbers cost more memory or have no meaning."""
    kind = field_types(CLASSES[name])[one.name]
    for value in (10**12, 1e12, -(10**12), -1e12):
        if type(value) in (get_args(kind) or (kind,)):
            message = refused(name, one.name, value)
            assert message.startswith(f"{one.name} must be ") and repr(value) in message


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("svg", {"seed": "x"}, "seed must be a whole number, got 'x'"),
        ("svg", {"samples": 10**12}, "samples must be in [1, 10000], got 1000000000000"),
        ("svg", {"samples": True}, "samples must be a whole number, got true"),
        ("neighborhood", {"tile": ()}, "tile must be a tuple of 3 values (each a whole number) or none, got ()"),
        ("neighborhood", {"stride": (1, 2)}, "stride must be a tuple of 3 values (each a whole number), got (1, 2)"),
        ("neighborhood", {"stride": (1, 2, -1)}, "stride must be in [0, 10000], got (1, 2, -1)"),
        ("neighborhood", {"window": math.nan}, "window must be in (0, 1], got nan"),
        ("radial", {"dense_distance": 10**6}, "dense_distance must be in [-1, 10000], got 1000000"),
        ("radial", {"dense_distance": 1.5}, "dense_distance must be a whole number, got 1.5"),
        ("radial", {"decay": math.inf}, "decay must be in (0, 1000000], got inf"),
        ("radial", {"sink": 1}, "sink must be true or false, got 1"),
        ("radial", {"density": 2.0}, "density must be in (0, 1], got 2.0"),
        ("adaspa", {"queries_per_block": math.inf}, "queries_per_block must be a whole number or none, got inf"),
        ("adaspa", {"queries_per_block": 3}, "queries_per_block must be a power of two in [1, 256], got 3"),
        ("adaspa", {"search_interval": 0}, "search_interval must be in [1, 10000], got 0"),
        ("adaspa", {"search_interval": 1.5}, "search_interval must be in (0, 1], got 1.5"),
        ("xattention", {"stride": 12}, "stride must be a power of two in [1, 256], got 12"),
        ("rettention", {"inner": "svg3"}, "inner must be a method, got 'svg3'"),
        ("sol", {"budget": 0.3}, "budget must be a budget such as top(0.2) or none, got 0.3"),
    ],
    ids=str,
)
def test_messages(text, settings, message):
    with pytest.raises(ValueError) as error:
        CLASSES[text](**settings)
    assert str(error.value) == message


def test_values_get_the_types_of_their_fields():
    one = Neighborhood(stride=[1, np.int64(2), 3], window=1, density=np.float32(0.5))
    assert one == Neighborhood(stride=(1, 2, 3), window=1.0, density=0.5) and hash(one)
    assert (type(one.stride), type(one.stride[1]), type(one.window), type(one.density)) == (tuple, int, float, float)
    assert type(SVG(samples=np.int32(8)).samples) is int


def test_budgets_and_inner_methods_are_instances():
    assert method("asa", budget=Mass(0.9)).budget == Mass(0.9) and method("cached", inner=Radial()).inner == Radial()
    with pytest.raises(ValueError, match="give a density or a budget, not both"):
        method("asa", budget=Top(0.2), density=0.3)


@dataclass(frozen=True, kw_only=True)
class Custom(Method):
    """A method from outside, with a field that is not checked, and ranges of its own."""

    callback: Any = None
    table: dict[str, int] | None = None
    size: int = within("[2, 8)", 4)
    side: int | None = within(POWER_OF_TWO, None)
    share: float = within(Range("a third or a half", lambda value: value in (1 / 3, 0.5)), 0.5)
    free: float = 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 8}, "size must be in [2, 8), got 8"),
        ({"side": 6}, "side must be a power of two in [1, 256], got 6"),
        ({"share": 0.2}, "share must be a third or a half, got 0.2"),
        ({"free": math.nan}, "free must be finite, got nan"),
        ({"free": "1"}, "free must be a number, got '1'"),
        ({"size": "a" * 1000}, f"size must be a whole number, got '{'a' * 27}"),
    ],
    ids=str,
)
def test_methods_from_outside_use_the_same_checks(settings, message):
    assert Custom(callback=print, table={"a": 1}, size=7, side=8).table == {"a": 1}
    with pytest.raises(ValueError) as error:
        Custom(**settings)
    assert str(error.value).startswith(message) and len(str(error.value)) < 120


def test_annotations_that_cannot_be_evaluated_are_skipped():
    @dataclass(frozen=True)
    class Local:
        value: Hidden = 3

    class Hidden:
        pass

    check_fields(Local())


def test_defaults_are_within_their_ranges():
    for cls in CLASSES.values():
        assert cls().resolve(Grid(2, 4, 4), 16) == cls()
