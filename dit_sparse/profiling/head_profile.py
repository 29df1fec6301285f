"""Head profiles: a method for every head of a model, as readable JSON.

    {"schema": 2, "model": "...", "transformer": "WanTransformer3DModel", "source": "...",
     "schedule": {"dense_steps": 0.25, "dense_layers": 0, "replan_interval": 1},
     "methods": {"a": {"method": "radial", "settings": {"density": 0.2}}, ...},
     "layers": ["aab", "bba", ...],
     "measured": {...} or null}

``layers`` has a string per layer with a letter per head. Settings of methods are fractions, so a profile made at one
video size also fits others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..composition import PerHead
from ..grid import short_repr
from ..methods import method
from ..notation.reading import read_json, shorten_path
from ..notation.settings import alternatives_to
from ..schedule import Schedule

SCHEMA = 2  # 1 had other names of settings


class MethodEntry(BaseModel):
    """A method by its name in ``dit_sparse.METHODS``, and its settings."""

    model_config = ConfigDict(extra="forbid")
    method: str
    settings: dict[str, Any] = Field(default_factory=dict)


class Profile(BaseModel):
    """A head profile: one file of ``profiles/``.

    Attributes:
        version: version of the file format, ``schema`` in JSON.
        model: name of the model and of the profile.
        transformer: class name of the transformers that the profile fits.
        source: origin of the profile: a measurement, or a paper.
        schedule: keyword arguments of ``Schedule``.
        methods: methods by letter.
        layers: a string per layer, a letter per head.
        measured: conditions and results of the search, or None if nothing was measured.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    version: int = Field(SCHEMA, alias="schema")
    model: str
    transformer: str
    source: str
    schedule: dict[str, int | float | tuple[float, float]] = Field(default_factory=dict)
    methods: dict[str, MethodEntry]
    layers: list[str]
    measured: dict[str, Any] | None = None

    @classmethod
    def load(cls, name_or_path: str | Path) -> Profile:
        """Load a profile by its name in ``profiles/`` or from a file.

        Raises:
            ValueError: there is no such profile, the file is damaged or newer than this library, or it has an unknown
                method or setting.
        """
        path = _find(name_or_path)
        try:
            content = read_json(path)
        except ValueError as error:
            raise ValueError(f"{shorten_path(path)} cannot be read as a profile: {error}") from None
        version = content.get("schema") if isinstance(content, dict) else None
        if not isinstance(version, int) or version < 1:
            raise ValueError(f"{shorten_path(path)} is not a profile: it has no number under 'schema'")
        if version != SCHEMA:
            remedy = "upgrade dit-sparse" if version > SCHEMA else "search it again with dit-sparse profile"
            found = f"{shorten_path(path)} has schema {short_repr(version)}"
            raise ValueError(f"{found}, but this version of dit-sparse reads {SCHEMA}: {remedy}")
        try:
            profile = cls.model_validate(content)
            profile.to_method()
            profile.to_schedule()
        except ValidationError as error:
            first = error.errors()[0]
            location = ".".join(map(str, first["loc"]))
            raise ValueError(f"{shorten_path(path)} is damaged: {shorten_path(location)}: {first['msg']}") from None
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{shorten_path(path)} cannot be used: {_first_line(error)}") from None
        return profile

    def dumps(self) -> str:
        """Return the profile as JSON, with a line per layer and per row of numbers."""
        return _dump(self.model_dump(by_alias=True)) + "\n"

    def to_method(self) -> PerHead:
        """Return the method that applies the profile."""
        methods = ((letter, method(entry.method, **entry.settings)) for letter, entry in self.methods.items())
        return PerHead(methods=tuple(methods), layers=tuple(self.layers))

    def to_schedule(self) -> Schedule:
        """Return the schedule of the profile."""
        return Schedule(**self.schedule)

    def check_transformer(self, transformer: object) -> None:
        """Raise ValueError if the profile is for another transformer class."""
        if self.transformer not in (cls.__name__ for cls in type(transformer).__mro__):
            raise ValueError(
                f"the profile {self.model} is for a {self.transformer}, got a {type(transformer).__name__}"
            )

    def __repr__(self) -> str:
        heads, methods = len(self.layers[0]) if self.layers else 0, len(self.methods)
        plural = "s" if methods != 1 else ""
        return f"Profile({self.model}: {len(self.layers)} layers x {heads} heads, {methods} method{plural})"

    __str__ = __repr__


def profile_names() -> list[str]:
    """Return the names of the profiles in ``profiles/``."""
    return sorted(path.stem for path in _folder().glob("*.json"))


def _folder() -> Path:
    """Return ``profiles/``, inside the package in a wheel and next to it in a checkout."""
    package = Path(__file__).parent.parent
    return next(folder for folder in (package / "profiles", package.parent / "profiles") if folder.is_dir())


def _find(name_or_path: str | Path) -> Path:
    """Return the file of a profile. Raises ValueError if there is none."""
    if not isinstance(name_or_path, str | Path):
        raise ValueError(f"a profile must be given by its name or path, got {short_repr(name_or_path)}")
    try:
        for path in (Path(name_or_path), _folder() / f"{name_or_path}.json"):
            if path.is_file():
                return path
    except (OSError, ValueError):
        pass  # a name that is too long or has a zero byte, or a folder without read permission
    name = str(name_or_path)
    raise ValueError(f"no profile {name[:60]!r}, neither a file nor a name; {alternatives_to(name, profile_names())}")


def _first_line(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "its settings are nested too deep"
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _dump(value: Any, indent: str = "") -> str:
    """Return JSON with a line for every string of a list and for every list of numbers."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    has_strings = isinstance(value, list) and len(value) > 1 and any(isinstance(item, str) for item in items)
    if not has_strings and not any(isinstance(item, dict | list) for item in items):
        return json.dumps(value)
    deeper = indent + " "
    if isinstance(value, dict):
        lines = [f"{deeper}{json.dumps(key)}: {_dump(item, deeper)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    return "[\n" + ",\n".join(deeper + _dump(item, deeper) for item in value) + f"\n{indent}]"
