"""Choose the executor of a call.

A named executor runs the call or raises. ``auto`` takes the executor with the lowest cost estimated by its cost model
(`calibration.cost_model`), among those of the device that support the call and have passed a self-check.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

from torch import Tensor

from dit_sparse.clusters import ClusterPlan
from dit_sparse.kernels.executors import ON_GPU, executor
from dit_sparse.plan import Plan

from .calibration import CallSignature, cost_model, self_check

AUTO = {"cpu": ("cpu", "gather"), "cuda": (*ON_GPU, "gather")}  # candidates of ``auto`` by device type


@dataclass(frozen=True)
class Choice:
    """The executor of a call.

    Attributes:
        name: the executor's name, or "dense" for PyTorch's dense attention.
        reason: why it was chosen.
    """

    name: str
    reason: str

    @property
    def executor(self) -> ModuleType:
        return executor(self.name)


def why_not(name: str, q: Tensor, k: Tensor, plan: Plan | ClusterPlan, lse: bool = False) -> str | None:
    """Return None if an executor supports the call, otherwise the unmet requirement.

    Args:
        name: of the executor.
        q, k: ``[B, H, N, D]`` and ``[B, Hkv, N, D]``.
        plan: the plan to compute.
        lse: require a log-sum-exp.
    """
    module = executor(name)
    if lse and not module.LSE:
        return "returns no log-sum-exp, which the method's correction requires"
    if plan.tail is not None and not module.LSE:
        return "returns no log-sum-exp, which merging the pooled tail of the plan requires"
    if isinstance(plan, ClusterPlan) and not module.CLUSTERS:
        return "requires equal blocks, got clusters"
    reason = module.why_not(q, k, plan)
    if reason is None and getattr(module, "THIRD_PARTY", False):
        return self_check(name, CallSignature.from_call(q, plan))
    return reason


def pick(
    name: str, q: Tensor, k: Tensor, plan: Plan | ClusterPlan, *, or_dense: bool = False, lse: bool = False
) -> Choice:
    """Choose the executor of a call. ``auto`` reads the plan's density, which synchronizes with the GPU.

    Args:
        name: an executor, or "auto".
        q, k, plan, lse: as in `why_not`.
        or_dense: with "auto", choose "dense" if PyTorch's dense attention has the lowest estimated cost.

    Raises:
        RuntimeError: the named executor does not support the call.
    """
    if not isinstance(name, str) or name != "auto":
        if reason := why_not(name, q, k, plan, lse):
            raise RuntimeError(f"executor {name!r} cannot run this call: {reason}")
        return Choice(name, "requested by name")
    candidates = [name for name in AUTO.get(q.device.type, ("gather",)) if _is_candidate(name, q, k, plan, lse)]
    if len(candidates) == 1 and not or_dense:
        return Choice(candidates[0], "the only executor that supports this call")
    signature, tokens = CallSignature.from_call(q, plan), q.shape[:3].numel()
    pairs = tokens * q.shape[2]
    computed = pairs * (plan.density + plan.tail_density)
    seconds = {name: cost_model(name, signature).seconds(tokens, computed) for name in candidates}
    if or_dense:
        seconds["dense"] = cost_model("dense", replace(signature, reorders=False)).seconds(tokens, pairs)
    ranking = sorted(seconds, key=seconds.get)
    estimates = ", ".join(f"{name} {1000 * seconds[name]:.3g} ms" for name in ranking)
    return Choice(ranking[0], f"lowest estimated cost at density {plan.density:.2f} ({estimates})")


def _is_candidate(name: str, q: Tensor, k: Tensor, plan: Plan | ClusterPlan, lse: bool) -> bool:
    """Return whether ``auto`` may choose an executor: it supports the call and, except for gather, which is plain
    PyTorch, has passed a self-check."""
    if why_not(name, q, k, plan, lse) is not None:
        return False
    return name == "gather" or self_check(name, CallSignature.from_call(q, plan)) is None
