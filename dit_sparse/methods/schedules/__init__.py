"""Schedules: methods that compute a plan once and reuse it over steps or layers, or skip tokens or heads."""

from ...method import Method
from .adaspa import AdaSpa
from .sparsed import SparseD

SCHEDULES: dict[str, type[Method]] = {
    "adaspa": AdaSpa,
    "sparsed": SparseD,
}
