"""Schedules: methods that compute a plan once and reuse it over steps or layers, or skip tokens or heads."""

from ...method import Method
from .adaspa import AdaSpa
from .deltallm import DeltaLLM
from .nosa import NOSA
from .seqboat import SeqBoat
from .sparsed import SparseD
from .spatten import SpAtten
from .tidal import Tidal
from .token_select import TokenSelect

SCHEDULES: dict[str, type[Method]] = {
    "adaspa": AdaSpa,
    "deltallm": DeltaLLM,
    "nosa": NOSA,
    "sparsed": SparseD,
    "token_select": TokenSelect,
    "tidal": Tidal,
    "spatten": SpAtten,
    "seqboat": SeqBoat,
}
