"""Gates: scorers with parameters that ``dit-sparse train`` distils from a model; without weights they need no file."""

from ...method import Method
from .dma import DMA
from .sea import SEA
from .seer import Seer
from .sparsifiner import Sparsifiner
from .swinbert import SwinBERT

GATES: dict[str, type[Method]] = {
    "seer": Seer,
    "sparsifiner": Sparsifiner,
    "sea": SEA,
    "dma": DMA,
    "swinbert": SwinBERT,
}
