"""Scorers: methods that rank the key blocks of each query block by q and k."""

from ...method import Method
from .anchor import Anchor
from .asa import ASA
from .flexprefill import FlexPrefill
from .hip import HiP
from .infllm_v2 import InfLLMV2
from .sale import SALE
from .sparge import Sparge
from .spark import Spark
from .subblock import SubBlock
from .xattention import XAttention

SCORERS: dict[str, type[Method]] = {
    "anchor": Anchor,
    "asa": ASA,
    "flexprefill": FlexPrefill,
    "hip": HiP,
    "infllm_v2": InfLLMV2,
    "sale": SALE,
    "spark": Spark,
    "sparge": Sparge,
    "subblock": SubBlock,
    "xattention": XAttention,
}
