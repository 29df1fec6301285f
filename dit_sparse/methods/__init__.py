"""Methods, one file per paper, in one folder per kind. The CLI, the demo, the tests and the docs read ``KINDS`` and
``METHODS``."""

from __future__ import annotations

from typing import Any

from ..composition import Cached, PerHead
from ..grid import BaseGrid, Grid
from ..method import Method
from ..notation.parser import parse
from ..notation.registry import LoadProfile, Registry
from ..notation.syntax import Call, Node, ProfileName, UnionNode, has_settings, write
from .corrections import CORRECTIONS
from .gates import GATES
from .layouts import LAYOUTS
from .patterns import PATTERNS
from .patterns.svg import Band, Temporal
from .patterns.vdit import Skip, Vertical
from .schedules import SCHEDULES
from .scorers import SCORERS

KINDS: dict[str, dict[str, type[Method]]] = {
    "pattern": PATTERNS,
    "scorer": SCORERS,
    "layout": LAYOUTS,
    "schedule": SCHEDULES,
    "correction": CORRECTIONS,
    "gate": GATES,
}
METHODS: dict[str, type[Method]] = {name: cls for methods in KINDS.values() for name, cls in methods.items()}

# Named components of papers, and compositions. The components are also candidates for the heads of a profile.
PARTS: dict[str, type[Method]] = {
    "svg.spatial": Band,
    "svg.temporal": Temporal,
    "vdit.vertical": Vertical,
    "vdit.skip": Skip,
    "cached": Cached,
    "per_head": PerHead,
}

REGISTRY = Registry(METHODS, PARTS)
DEFAULT_METHOD = "routed"
DEFAULT_VOXEL_METHOD = "svg2"
DEFAULT_DENSITY = 0.25


def default_method(grid: BaseGrid) -> str:
    """Return the name of the method that is used on a grid unless the user names another one."""
    return DEFAULT_METHOD if isinstance(grid, Grid) else DEFAULT_VOXEL_METHOD


def method(text: str, /, **settings: Any) -> Method:
    """Return the method that a text describes.

    Args:
        text: such as ``radial(sink=true)|sink`` or ``cached(svg2, replan_interval=3)``, see
            `dit_sparse.notation.parser`.
        settings: further settings of the outermost method; of a union, of its first pattern.

    Raises:
        ValueError: the text cannot be read, a name or setting is unknown, or a value is invalid.
    """
    return REGISTRY.build(parse(text), settings)


def method_at_density(
    text: str, density: float | None, settings: dict[str, Any] | None = None, load_profile: LoadProfile | None = None
) -> Method:
    """Return the method that a text describes, at a density; None: 0.25, if neither text nor ``settings`` set anything.

    Args:
        text: as for `method`.
        density: fraction of the query-key pairs to compute.
        settings: further settings, as for `method`.
        load_profile: returns the method of a profile; None: profiles are refused.

    Raises:
        ValueError: as `method`.
    """
    node = parse(text)
    if density is None and not settings and not has_settings(node):
        density = DEFAULT_DENSITY
    return REGISTRY.build(node, (settings or {}) | ({} if density is None else {"density": density}), load_profile)


def kind_of(text: str) -> str:
    """Return the kind of the outermost method of a text.

    Returns:
        A key of ``KINDS``; "profile"; "other" for unknown names, such as methods of other packages, and for text that
        cannot be read. A union is a pattern, ``cached`` has the kind of the method inside it.
    """
    try:
        return _kind(parse(text))
    except ValueError:
        return "other"


def _kind(node: Node) -> str:
    if isinstance(node, UnionNode):
        return "pattern"
    if isinstance(node, ProfileName) or node.name == "per_head":
        return "profile"
    if node.name == "cached":
        inner = [*node.positional, *(value for name, value in node.settings if name == "inner")]
        return _kind(inner[0]) if inner and isinstance(inner[0], Call | UnionNode | ProfileName) else "other"
    name = node.name.partition(".")[0]  # a component of a paper, such as svg.temporal
    return next((kind for kind, methods in KINDS.items() if name in methods), "other")


def method_text(method: Method) -> str:
    """Return the canonical text of a method, which `method` reads back."""
    return write(REGISTRY.node(method))


def name_of(method: Method) -> str:
    """Return the canonical text of a method without its density, which reports give separately."""
    return write(REGISTRY.node(method, with_density=False))
