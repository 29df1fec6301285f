"""The settings of a method as the fields of a form, and the profiles that a form may name."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from dit_sparse import METHODS

from ..notation import syntax
from ..notation.parser import parse, parse_value
from ..notation.syntax import Call, Node, ProfileName, UnionNode, nodes, write
from ..profiling.head_profile import profile_names


@dataclass(frozen=True)
class MethodSetting:
    """A setting of a method that the form shows.

    Attributes:
        name: of the setting.
        type: its type annotation, as text.
        default: its default.
    """

    name: str
    type: str
    default: Any

    @property
    def default_text(self) -> str:
        return write(self.default)

    def parse(self, value: Any) -> Any:
        """Return the setting for the value of a form field. An empty field is None.

        Raises:
            ValueError: a text is not a value.
        """
        if self.type == "bool":
            return bool(value)
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        value = parse_value(value) if isinstance(value, str) else value
        return int(value) if self.type == "int" and isinstance(value, float) and value.is_integer() else value


def method_settings(method: str) -> list[MethodSetting]:
    """Return the settings of the outermost method of a text, or of the first pattern of a union, that the text does not
    set. Density, budget and inner method are left out: the form has its own fields for them."""
    try:
        node = _outermost(parse(method))
    except ValueError:
        return []
    cls = METHODS.get(node.name) if isinstance(node, Call) else None
    if cls is None:
        return []
    hidden = {"density", "budget", "inner", *(name for name, _ in node.settings)}
    return [MethodSetting(f.name, str(f.type), f.default) for f in fields(cls) if f.name not in hidden]


def changed_settings(method: str, form: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a method that a form changed from their defaults."""
    settings = {one.name: one for one in method_settings(method) if one.name in form}
    values = {name: setting.parse(form[name]) for name, setting in settings.items()}
    return {name: value for name, value in values.items() if value != settings[name].default}


def sets_density(method: str) -> bool:
    """Return whether the text of a method determines its density. Raises ValueError if it cannot be read."""
    return syntax.sets_density(parse(method))


def check_names(method: str, form: dict[str, Any]) -> None:
    """Raise ValueError if the text of a method names a profile that is not one of ``profiles/``, such as a file, or if
    the text or the form names a file of weights."""
    tree = list(nodes(parse(method)))
    names = {node.name for node in tree if isinstance(node, ProfileName)}
    if not names <= set(profile_names()):
        raise ValueError(f"the profile must be one of {', '.join(profile_names())}")
    given = [value for node in tree if isinstance(node, Call) for name, value in node.settings if name == "weights"]
    if any(".safetensors" in str(value) for value in (*given, form.get("weights"))):
        raise ValueError("weights must be the name of bundled weights, not a file")


def _outermost(node: Node) -> Node:
    return _outermost(node.first) if isinstance(node, UnionNode) else node
