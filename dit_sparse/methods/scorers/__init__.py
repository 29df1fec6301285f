"""Scorers: methods that rank the key blocks of each query block by q and k."""

from ...method import Method
from .anchor import Anchor
from .asa import ASA
from .dhsa import DHSA
from .double_sparsity import DoubleSparsity
from .flexprefill import FlexPrefill
from .gui_kv import GUIKV
from .hip import HiP
from .infllm_v2 import InfLLMV2
from .proxyattn import ProxyAttn
from .sale import SALE
from .sparge import Sparge
from .spark import Spark
from .subblock import SubBlock
from .xattention import XAttention

SCORERS: dict[str, type[Method]] = {
    "anchor": Anchor,
    "asa": ASA,
    "dhsa": DHSA,
    "double_sparsity": DoubleSparsity,
    "flexprefill": FlexPrefill,
    "gui_kv": GUIKV,
    "hip": HiP,
    "infllm_v2": InfLLMV2,
    "proxyattn": ProxyAttn,
    "sale": SALE,
    "sparge": Sparge,
    "spark": Spark,
    "subblock": SubBlock,
    "xattention": XAttention,
}
