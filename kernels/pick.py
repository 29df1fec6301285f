"""Which executor runs, and why not the others.

An executor is a module with ``attend(q, k, v, plan, scale) -> (out, lse)``, ``why_not(q, k, plan) -> str | None``,
``LSE``, and ``CLUSTERS``: whether it takes cluster plans too. One that is named runs or raises; ``auto`` takes the
first of its list that can.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from torch import Tensor

from dit_sparse.clusters import ClusterPlan
from dit_sparse.plan import Plan

EXECUTORS = ("reference", "gather", "cpu", "flex", "block_sparse", "block_ragged")
# block_sparse joins the automatic choice once it has been measured on a GPU.
AUTO = {"cpu": ("cpu", "gather"), "cuda": ("flex", "block_ragged", "gather")}


def executor(name: str) -> ModuleType:
    """The executor of that name. Raises ValueError when there is none."""
    if name not in EXECUTORS:
        raise ValueError(f"there is no executor {name!r}; there are auto, {', '.join(EXECUTORS)}")
    return importlib.import_module(f"dit_sparse.kernels.{name}")


def why_not(name: str, q: Tensor, k: Tensor, plan: Plan | ClusterPlan) -> str | None:
    """Why an executor cannot run this call, in words; None when it can."""
    module = executor(name)
    if isinstance(plan, ClusterPlan) and not module.CLUSTERS:
        return "it computes blocks of one size, and the method made clusters of any size"
    return module.why_not(q, k, plan)


def pick(name: str, q: Tensor, k: Tensor, plan: Plan | ClusterPlan) -> tuple[str, ModuleType]:
    """The executor for this call: ``name`` itself, or the first of the device's list for ``auto``.

    Raises:
        RuntimeError: the named executor cannot run this call; the message says why not.
    """
    if name == "auto":
        candidates = AUTO.get(q.device.type, ("gather",))
        name = next(name for name in candidates if why_not(name, q, k, plan) is None)
    elif reason := why_not(name, q, k, plan):
        raise RuntimeError(f"the executor {name!r} cannot run here: {reason}")
    return name, executor(name)
