"""Scorers: methods that rank the key blocks of each query block by q and k."""

from ...method import Method
from .asa import ASA
from .sparge import Sparge
from .subblock import SubBlock
from .xattention import XAttention

SCORERS: dict[str, type[Method]] = {
    "asa": ASA,
    "sparge": Sparge,
    "subblock": SubBlock,
    "xattention": XAttention,
}
