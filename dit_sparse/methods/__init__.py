"""Methods, one file per paper. The CLI, the demo, the tests and the README read the table ``METHODS``."""

from __future__ import annotations

from typing import Any

from ..composition import Cached, PerHead
from ..method import Method
from ..notation.parser import parse
from ..notation.registry import LoadProfile, Registry
from ..notation.syntax import has_settings, write
from .adaspa import AdaSpa
from .asa import ASA
from .dense import Dense
from .neighborhood import Neighborhood
from .pbs import PBS
from .pooled import Pooled
from .radial import Radial
from .random_blocks import RandomBlocks
from .rettention import Rettention
from .routed import Routed
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
    "routed": Routed,
    "sink": Sink,
    "pooled": Pooled,
    "rettention": Rettention,
}

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
DEFAULT_DENSITY = 0.25


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


def method_text(method: Method) -> str:
    """Return the canonical text of a method, which `method` reads back."""
    return write(REGISTRY.node(method))


def name_of(method: Method) -> str:
    """Return the canonical text of a method without its density, which reports give separately."""
    return write(REGISTRY.node(method, with_density=False))
