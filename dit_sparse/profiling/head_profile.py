"""Profiles: which method computes which head of one model, as JSON that people can read.

    {"schema": 1, "model": "...", "transformer": "WanTransformer3DModel", "source": "...",
     "schedule": {"dense_steps": 0.25, "dense_layers": 0, "replan_interval": 1},
     "methods": {"a": {"method": "radial", "settings": {"density": 0.2}}, ...},
     "layers": ["aab", "bba", ...],
     "measured": {...} or null}

A string a layer, a letter a head. Settings are those of the methods, which are fractions, so a profile that was made at
one size serves another.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..composition import PerHead
from ..methods import method
from ..schedule import Schedule

SCHEMA = 1


class Entry(BaseModel):
    """A method by its name in ``dit_sparse.METHODS``, and its settings."""

    model_config = ConfigDict(extra="forbid")
    method: str
    settings: dict[str, Any] = Field(default_factory=dict)


class Profile(BaseModel):
    """One file of ``profiles/``.

    Attributes:
        version: of this format.
        model: what the profile is called and made for.
        transformer: class name of the transformers that it fits.
        source: how it came about: measured, or taken from a paper.
        schedule: arguments of ``Schedule``.
        methods, layers: see above.
        measured: conditions and results of the search; None: nothing was measured.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    version: int = Field(SCHEMA, alias="schema")
    model: str
    transformer: str
    source: str
    schedule: dict[str, int | float] = Field(default_factory=dict)
    methods: dict[str, Entry]
    layers: list[str]
    measured: dict[str, Any] | None = None

    @classmethod
    def load(cls, name_or_path: str | Path) -> Profile:
        """A profile that ships with the library, by its name, or a file.

        Raises:
            ValueError: there is none, it is damaged or newer than this library, or it names what does not exist.
        """
        path = _find(name_or_path)
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as a profile: {error}") from None
        version = found.get("schema") if isinstance(found, dict) else None
        if not isinstance(version, int) or version < 1:
            raise ValueError(f"{path} is no profile: it has no number under 'schema'")
        if version > SCHEMA:
            raise ValueError(
                f"{path} has schema {version}, and this dit-sparse reads up to {SCHEMA}: install a newer one"
            )
        try:
            profile = cls.model_validate(found)
            profile.mixture()
            profile.when()
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{path} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} cannot be used: {error}") from None
        return profile

    def dumps(self) -> str:
        """As text: one line for each layer, and one for each row of numbers."""
        return _pretty(self.model_dump(by_alias=True)) + "\n"

    def mixture(self) -> PerHead:
        """The method that follows this profile."""
        made = ((letter, method(entry.method, **entry.settings)) for letter, entry in self.methods.items())
        return PerHead(methods=tuple(made), layers=tuple(self.layers))

    def when(self) -> Schedule:
        """The schedule that goes with it."""
        return Schedule(**self.schedule)


def names() -> list[str]:
    """The profiles that ship."""
    return sorted(path.stem for path in _folder().glob("*.json"))


def _folder() -> Path:
    """Inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parent.parent
    return next(folder for folder in (package / "profiles", package.parent / "profiles") if folder.is_dir())


def _find(name_or_path: str | Path) -> Path:
    try:
        for path in (Path(name_or_path), _folder() / f"{name_or_path}.json"):
            if path.is_file():
                return path
    except OSError:
        pass  # a name too long for a file, or a folder that may not be read
    raise ValueError(f"there is no profile {str(name_or_path)!r}, neither a file nor one of {', '.join(names())}")


def _pretty(value: Any, indent: str = "") -> str:
    """JSON with a line for every string of a list, and one for every list of numbers."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    words = isinstance(value, list) and len(value) > 1 and any(isinstance(part, str) for part in inside)
    if not words and not any(isinstance(part, dict | list) for part in inside):
        return json.dumps(value)
    deeper = indent + " "
    if isinstance(value, dict):
        lines = [f"{deeper}{json.dumps(key)}: {_pretty(part, deeper)}" for key, part in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    return "[\n" + ",\n".join(deeper + _pretty(part, deeper) for part in value) + f"\n{indent}]"
