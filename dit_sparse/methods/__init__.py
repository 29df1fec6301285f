"""One paper, one file. This table is what the CLI, the tests, the demo and the README read."""

from __future__ import annotations

import re
from dataclasses import fields
from functools import reduce
from operator import or_
from typing import Any

from ..budget import Above, Mass, Top
from ..composition import Cached, PerHead
from ..method import Method, Union
from .adaspa import AdaSpa
from .asa import ASA
from .dense import Dense
from .neighborhood import Neighborhood
from .pbs import PBS
from .pooled import Pooled
from .radial import Radial
from .random_blocks import RandomBlocks
from .rettention import Rettention
from .sink import Sink
from .sol import Sol
from .sparge import Sparge
from .sparsed import SparseD
from .subblock import SubBlock
from .svg import SVG, Band, Temporal
from .svg2 import SVG2
from .vdit import Skip, VDiT, Vertical
from .window import Window
from .xattention import XAttention

METHODS: dict[str, type[Method]] = {
    "dense": Dense,
    "random_blocks": RandomBlocks,
    "window": Window,
    "neighborhood": Neighborhood,
    "radial": Radial,
    "svg": SVG,
    "svg2": SVG2,
    "adaspa": AdaSpa,
    "sparsed": SparseD,
    "asa": ASA,
    "pbs": PBS,
    "sparge": Sparge,
    "subblock": SubBlock,
    "xattention": XAttention,
    "vdit": VDiT,
    "sol": Sol,
    "sink": Sink,
    "pooled": Pooled,
    "rettention": Rettention,
}

# What papers mix: candidates for the heads of a profile, and names like all others.
PARTS: dict[str, type[Method]] = {
    "svg.spatial": Band,
    "svg.temporal": Temporal,
    "vdit.vertical": Vertical,
    "vdit.skip": Skip,
    "cached": Cached,
    "per_head": PerHead,
}

_VALUES = {cls.__name__: cls for cls in (*METHODS.values(), *PARTS.values(), Union, Top, Mass, Above)}


def method(name: str, **settings: Any) -> Method:
    """The method of that name with these settings; also ``a|b``, all that either pattern keeps, and ``outer(inner)``, a
    method around another one. A density is then the whole's.

    Raises:
        ValueError: an unknown name, an unknown setting, or a value out of range; the message lists what there is.
    """
    if nested := re.fullmatch(r"(\w+)\((.+)\)", name):
        return method(nested[1], inner=method(nested[2]), **settings)
    parts = [part.strip() for part in name.split("|")]
    if len(parts) > 1:
        return method(parts[0], **settings) | reduce(or_, map(method, parts[1:]))
    if name not in METHODS | PARTS:
        raise ValueError(f"there is no method {name!r}; there are {', '.join(METHODS)}")
    cls = (METHODS | PARTS)[name]
    known = [field.name for field in fields(cls)]
    if unknown := [key for key in settings if key not in known]:
        raise ValueError(f"{name} has no setting {unknown[0]!r}; it has {', '.join(known)}")
    if name in ("cached", "per_head") and not {"inner", "methods"} & set(settings):
        raise ValueError(f"{name} is made of other methods: write cached(NAME), or use dit_sparse.PerHead")
    try:
        return cls(**{key: _revived(value) for key, value in settings.items()})
    except TypeError as error:
        raise ValueError(f"{name} cannot have these settings: {error}") from None


def name_of(method: Method) -> str:
    """The name that makes such a method; the class's own name for one that is not in the tables."""
    if isinstance(method, Union):
        return "|".join(map(name_of, method.parts))
    names = (name for name, cls in (METHODS | PARTS).items() if cls is type(method))
    name = next(names, type(method).__name__)
    usual = getattr(type(method), "inner", None)
    inner = getattr(method, "inner", usual)
    return name if type(inner) is type(usual) else f"{name}({name_of(inner)})"


def _revived(value: Any) -> Any:
    """What `Method.settings` made plain: budgets, methods and tuples again."""
    if isinstance(value, list):
        return tuple(map(_revived, value))
    if isinstance(value, dict):
        name, settings = next(iter(value.items()), (None, None))
        if name not in _VALUES or len(value) > 1 or not isinstance(settings, dict):
            raise ValueError(f"{value} is neither a method nor a budget such as {{'Top': {{'density': 0.2}}}}")
        return _VALUES[name](**{key: _revived(part) for key, part in settings.items()})
    return value
