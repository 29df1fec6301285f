"""The variants of a method in which one of its parts is left out, or is the only one."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from dit_sparse import Method
from dit_sparse.methods import method, name_of
from dit_sparse.notation.settings import field_types


@dataclass(frozen=True)
class Variant:
    """A variant of a method.

    Attributes:
        part: the setting that differs.
        kind: "left out" or "alone".
        method: text of the variant.
    """

    part: str
    kind: str
    method: str


def parts_of(one: Method) -> dict[str, Any]:
    """Return the settings that can be switched off, with the value that does so: true to false, a value to none."""
    hints, off = field_types(type(one)), {}
    for setting in fields(one):
        value = getattr(one, setting.name)
        if setting.name in ("density", "inner") or value is None or value is False:
            continue
        if value is True:
            off[setting.name] = False
        elif type(None) in get_args(hints[setting.name]):
            off[setting.name] = None
    return off


def variants(text: str) -> list[Variant]:
    """Return the variants of a method: without each part, and with each part alone.

    Raises:
        ValueError: the text is no method, or none of its settings can be switched off.
    """
    one = method(text)
    off = parts_of(one)
    if not off:
        raise ValueError(f"{name_of(one)} has no setting that can be switched off, so there is nothing to leave out")
    without = [Variant(part, "left out", name_of(replace(one, **{part: value}))) for part, value in off.items()]
    if len(off) < 2:
        return without
    nothing = replace(one, **off)
    alone = [Variant(part, "alone", name_of(replace(nothing, **{part: getattr(one, part)}))) for part in off]
    return [*without, Variant("all", "left out", name_of(nothing)), *alone]
