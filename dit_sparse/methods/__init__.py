"""One paper, one file. This table is what the CLI, the tests, the demo and the README read."""

from __future__ import annotations

from ..method import Method
from .adaspa import AdaSpa
from .asa import ASA
from .dense import Dense
from .neighborhood import Neighborhood
from .pbs import PBS
from .radial import Radial
from .random_blocks import RandomBlocks
from .sparge import Sparge
from .sparsed import SparseD
from .subblock import SubBlock
from .svg import SVG
from .svg2 import SVG2
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
}


def method(name: str, **settings) -> Method:
    """The method of that name with these settings.

    Raises:
        ValueError: an unknown name, an unknown setting, or a value out of range; the message lists what there is.
    """
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}; there are {', '.join(METHODS)}")
    known = METHODS[name].__dataclass_fields__
    if unknown := [key for key in settings if key not in known]:
        raise ValueError(f"{name} has no setting {unknown[0]!r}; it has {', '.join(known)}")
    return METHODS[name](**settings)


def name_of(method: Method) -> str:
    """The table's name of a method; the class's own name for one that is not in it."""
    names = (name for name, cls in METHODS.items() if cls is type(method))
    return next(names, type(method).__name__)
