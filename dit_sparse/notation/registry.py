"""Methods and budgets by name: from syntax trees to instances and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields, replace
from typing import Any

from ..budget import Above, Mass, Top
from ..composition import PerHead
from ..grid import short_repr
from ..method import Method
from ..pattern import Union
from .external import external_name, find_method
from .settings import alternatives_to, check_settings
from .syntax import Call, Node, ProfileName, UnionNode, write

BUDGETS = {"top": Top, "mass": Mass, "above": Above}
UNION = {"union": Union}  # for unions that a|b cannot express

LoadProfile = Callable[[str], Method]


@dataclass(frozen=True)
class Registry:
    """Names of methods.

    Attributes:
        methods: listed in messages and by ``dit-sparse methods``.
        parts: other methods that have a name.
    """

    methods: dict[str, type[Method]]
    parts: dict[str, type[Method]]

    def build(self, node: Node, settings: dict[str, Any], load_profile: LoadProfile | None = None) -> Method:
        """Return the method of a syntax tree.

        Args:
            node: from `parse`.
            settings: further settings of the outermost method, as Python or JSON values. Those of a union are for its
                first pattern; the density of the first pattern is the density of the union.
            load_profile: returns the method of a profile; None: profiles are refused.

        Raises:
            ValueError: a name or setting is unknown, or a value is invalid.
        """
        if isinstance(node, UnionNode):
            return self.build(node.first, settings, load_profile) | self.build(node.rest, {}, load_profile)
        if isinstance(node, ProfileName):
            if load_profile is None:
                raise ValueError(
                    f"{write(node)[:60]} cannot be used here: a profile needs the model that it is made for"
                )
            if settings:
                raise ValueError(f"{write(node)[:60]} has its own settings, so it takes no {next(iter(settings))}")
            return load_profile(node.name)
        try:
            settings = {key: self._from_json(value) for key, value in settings.items()}
        except RecursionError:
            raise ValueError(f"settings of {write(node)[:60]} are nested too deeply") from None
        return self._instance(node, settings, self.methods | self.parts | UNION, load_profile)

    def node(self, value: Any, with_density: bool = True) -> Any:
        """Return the syntax tree of a method or budget, without settings that have their default; of a tuple, the tuple
        of its trees; of any other value, the value."""
        if isinstance(value, tuple):
            return tuple(map(self.node, value))
        if isinstance(value, PerHead) and value.profile:
            return ProfileName(value.profile)
        if isinstance(value, Union) and len(value.parts) == 2 and value.parts[0].density is None:
            first = replace(value.parts[0], density=value.density if with_density else None)
            return UnionNode(self.node(first), self.node(value.parts[1]))
        if not isinstance(value, Method | Top | Mass | Above):
            return value
        changed = {f.name: getattr(value, f.name) for f in fields(value) if not _has_default(f, value)}
        if not with_density:
            changed.pop("density", None)
        positional = [changed.pop(name) for name in _positional(type(value))[:1] if name in changed]
        names = {cls: name for name, cls in (self.methods | self.parts | UNION | BUDGETS).items()}
        return Call(
            names.get(type(value)) or external_name(type(value)),
            tuple(self.node(one, with_density=False) for one in positional),
            tuple((name, self.node(one)) for name, one in changed.items()),
        )

    def _instance(
        self, node: Call, settings: dict[str, Any], classes: dict[str, type], load_profile: LoadProfile | None = None
    ) -> Any:
        name = node.name
        external = find_method(name) if classes is not BUDGETS and name not in classes else None
        if external is None and name not in classes:
            kind, listed = ("budget", classes) if classes is BUDGETS else ("method", self.methods)
            raise ValueError(f"there is no {kind} {name[:60]!r}; {alternatives_to(name, classes, listed)}")
        cls = external or classes[name]
        positional = _positional(cls)
        if len(node.positional) > len(positional):
            text = write(node.positional[len(positional)])[:60]
            raise ValueError(f"settings of {name} are written NAME=VALUE, got {text!r} without a name")
        values = dict(zip(positional, node.positional, strict=False))
        for key, value in (*node.settings, *settings.items()):
            if key in values:
                raise ValueError(f"{key} of {name} is given twice")
            values[key] = value

        def nested(node: Node, base: type) -> Any:
            if issubclass(base, Method):
                return self.build(node, {}, load_profile)
            if isinstance(node, Call):
                return self._instance(node, {}, BUDGETS)
            raise ValueError(f"a budget must be one of {', '.join(BUDGETS)}, got {write(node)[:60]!r}")

        values = check_settings(name, cls, values, nested)
        for f in fields(cls):
            if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
                example = "METHOD" if f.name == "inner" else f"{f.name}=VALUE"
                raise ValueError(f"{name} needs {f.name}: write {name}({example})")
        inner = getattr(values.get("inner"), "density", None)
        if inner is not None and values.get("density") not in (None, inner):
            raise ValueError(f"density is given twice: {values['density']} for {name} and {inner} inside it")
        return cls(**values)

    def _from_json(self, value: Any) -> Any:
        """Return a plain value of `Method.settings` with syntax trees for methods and budgets, and tuples for lists."""
        if isinstance(value, list | tuple):
            return tuple(map(self._from_json, value))
        if not isinstance(value, dict):
            return value
        names = {cls.__name__: name for name, cls in (self.methods | self.parts | UNION | BUDGETS).items()}
        name, settings = next(iter(value.items()), (None, None))
        if name not in names or len(value) > 1 or not isinstance(settings, dict):
            example = {"Top": {"density": 0.2}}
            raise ValueError(f"{short_repr(value)} is neither a method nor a budget such as {example}")
        return Call(names[name], (), tuple((key, self._from_json(part)) for key, part in settings.items()))


def _positional(cls: type) -> list[str]:
    """Fields that may be given without a name: the method inside another one, or the fields of a budget in order."""
    names = [field.name for field in fields(cls)]
    return [name for name in names if name == "inner"] if issubclass(cls, Method) else names


def _has_default(field: Field, owner: Any) -> bool:
    value, default = getattr(owner, field.name), field.default
    if field.name == "inner" and isinstance(default, Method):
        default = replace(default, density=value.density)  # the density of the method around it
    return value == default
