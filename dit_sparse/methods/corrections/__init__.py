"""Corrections: methods that also estimate what a plan leaves out, or correct the output of another method."""

from ...method import Method
from .pooled import Pooled
from .rettention import Rettention
from .routed import Routed
from .sol import Sol

CORRECTIONS: dict[str, type[Method]] = {
    "sol": Sol,
    "pooled": Pooled,
    "rettention": Rettention,
    "routed": Routed,
}
