"""Executors: modules that compute attention for a plan.

Each has ``attend(q, k, v, plan, scale) -> (out, lse)``, ``why_not(q, k, plan) -> str | None``, ``LSE`` (whether it
returns a log-sum-exp) and ``CLUSTERS`` (whether it takes cluster plans). An executor that calls another package sets
``THIRD_PARTY``: it runs only after a self-check against the reference.
"""

from __future__ import annotations

import importlib
from types import ModuleType

ON_GPU = ("block_sparse", "block_ragged", "flex", "paged", "xformers_paged", "flash4", "flashinfer_sparse")
EXECUTORS = ("reference", "gather", "cpu", *ON_GPU)


def executor(name: str) -> ModuleType:
    """Return the executor module of that name.

    Raises:
        ValueError: there is no such executor.
    """
    if name not in EXECUTORS:
        raise ValueError(f"there is no executor {name!r}; there are auto, {', '.join(EXECUTORS)}")
    return importlib.import_module(f"{__name__}.{name}")
