"""Patterns: masks of fixed shape, chosen by the token grid or for each head."""

from ...method import Method
from .arrow import Arrow
from .dense import Dense
from .masformer import MASFormer
from .moa import MoA
from .neighborhood import Neighborhood
from .power import Power
from .radial import Radial
from .random_blocks import RandomBlocks
from .sink import Sink
from .svg import SVG
from .svga import SVGA
from .vdit import VDiT
from .window import Window

PATTERNS: dict[str, type[Method]] = {
    "dense": Dense,
    "random_blocks": RandomBlocks,
    "window": Window,
    "neighborhood": Neighborhood,
    "radial": Radial,
    "sink": Sink,
    "power": Power,
    "svga": SVGA,
    "arrow": Arrow,
    "moa": MoA,
    "masformer": MASFormer,
    "svg": SVG,
    "vdit": VDiT,
}
