"""Which executor runs, and why not the others.

An executor is a module with ``attend(q, k, v, plan, scale) -> (out, lse)``, ``why_not(q, k, plan) -> str | None``,
``LSE``, and ``CLUSTERS``: whether it takes cluster plans too. Whose attention is not ours says ``THIRD_PARTY``, and
runs only where a self-check against the reference has passed. One that is named runs or raises; ``auto`` takes the
cheapest of its list by what a trial on this machine has measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

from torch import Tensor

from dit_sparse.clusters import ClusterPlan
from dit_sparse.kernels.executors import ON_GPU, executor
from dit_sparse.plan import Plan

from .calibration import CallSignature, cost_model, self_check

AUTO = {"cpu": ("cpu", "gather"), "cuda": (*ON_GPU, "gather")}


@dataclass(frozen=True)
class Choice:
    """An executor's name, or "dense", and why that one."""

    name: str
    reason: str

    @property
    def executor(self) -> ModuleType:
        return executor(self.name)


def why_not(name: str, q: Tensor, k: Tensor, plan: Plan | ClusterPlan, lse: bool = False) -> str | None:
    """Why an executor cannot run this call, in words; None when it can. ``lse``: it has to return one."""
    module = executor(name)
    if lse and not module.LSE:
        return "it returns no log-sum-exp, which the method's correction needs"
    if isinstance(plan, ClusterPlan) and not module.CLUSTERS:
        return "it computes blocks of one size, and the method made clusters of any size"
    reason = module.why_not(q, k, plan)
    if reason is None and getattr(module, "THIRD_PARTY", False):
        return self_check(name, CallSignature.from_call(q, plan))
    return reason


def pick(
    name: str, q: Tensor, k: Tensor, plan: Plan | ClusterPlan, *, or_dense: bool = False, lse: bool = False
) -> Choice:
    """The executor for this call: ``name`` itself, or for ``auto`` the cheapest of the device's list, where
    ``or_dense`` puts dense attention beside them and ``lse`` leaves out those that return no log-sum-exp. Reads
    the plan's density, which waits for the device once.

    Raises:
        RuntimeError: the named executor cannot run this call; the message says why not.
    """
    if name != "auto":
        if reason := why_not(name, q, k, plan, lse):
            raise RuntimeError(f"the executor {name!r} cannot run here: {reason}")
        return Choice(name, "named")
    able = [name for name in AUTO.get(q.device.type, ("gather",)) if _able(name, q, k, plan, lse)]
    if len(able) == 1 and not or_dense:
        return Choice(able[0], "the only one that can")
    kind, tokens = CallSignature.from_call(q, plan), q.shape[:3].numel()
    pairs = tokens * q.shape[2]
    seconds = {name: cost_model(name, kind).seconds(tokens, pairs * plan.density) for name in able}
    if or_dense:
        seconds["dense"] = cost_model("dense", replace(kind, ordered=False)).seconds(tokens, pairs)
    ranked = sorted(seconds, key=seconds.get)
    told = ", ".join(f"{name} {1000 * seconds[name]:.3g} ms" for name in ranked)
    return Choice(ranked[0], f"estimated for a call at density {plan.density:.2f}: {told}")


def _able(name: str, q: Tensor, k: Tensor, plan: Plan | ClusterPlan, lse: bool) -> bool:
    """Whether ``auto`` may take it: one that compiles must have shown on this machine that it is right."""
    if why_not(name, q, k, plan, lse) is not None:
        return False
    return name == "gather" or self_check(name, CallSignature.from_call(q, plan)) is None
