"""Layouts: methods that reorder or cluster the tokens, so that fewer groups hold most of the attention."""

from ...method import Method
from .pbs import PBS
from .routing import Routing
from .spatial import Spatial
from .svg2 import SVG2

LAYOUTS: dict[str, type[Method]] = {
    "svg2": SVG2,
    "pbs": PBS,
    "routing": Routing,
    "spatial": Spatial,
}
