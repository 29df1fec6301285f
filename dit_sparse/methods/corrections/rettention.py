"""Re-ttention: corrects a sparse softmax by statistics of a periodic dense step.

Source: R. Chen et al., "Re-ttention: Ultra Sparse Visual Generation via Attention Statistical Reshape",
arXiv:2505.22918, sec. 4. The denominator of a sparse softmax is too small. A refresh computes the call both densely and
sparsely and stores for every query the share rho of the softmax that the kept keys M hold, and the output R of the
dropped keys:

    rho = exp(L_M - L),  R = O - rho O_M                at a refresh, whose output is the dense O
    O = rho O_M + R,     rho <- min(1, rho + ramp)      at the steps between two refreshes

The log-sum-exp between refreshes is L_M - log rho; log rho is stored, because rho can underflow. rho grows because the
dropped keys lose weight as the noise decreases. The plan must not change between refreshes, so it is reused until the
next one. Any method can make it.

Planning: that of the inner method; a refresh computes a dense call.

Differs from the authors:
- R is stored for each head instead of after the output projection, which is equivalent.
- rho is bounded by 1; their ramp has no bound.
- They keep a window in every frame (here by default ``Window``). Any other method can take its place.
- Their refreshes are every fifth of 20 steps (PixArt) or 50 steps (CogVideoX), after 10-30 % dense steps, at a density
  of .03 to .06.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...composition import Correction
from ...grid import Site
from ...kernels.free_memory import require_memory
from ...method import AttentionOutput, Method
from ...notation.settings import within
from ...plan import Plan
from ..patterns.window import Window

DEFAULT_INNER = Window()
MIN_LOG = -1e30  # of rho, for rows whose kept keys are all padding: subtracting -inf from -inf would give NaN


@dataclass(frozen=True, kw_only=True)
class Rettention(Correction):
    """Correction of any plan.

    Needs ``H * N * (D * bytes + 4)`` bytes for every layer, branch and batch item. It logs this, and raises before the
    generation if the memory is not free.

    Attributes:
        refresh_interval: steps between two refreshes.
        ramp: increase of rho per step; the authors use 0.04.
        offload: whether R is kept on the CPU.
    """

    static = False
    manages_own_plans = True
    reuses_outputs = True
    inner: Method = DEFAULT_INNER
    refresh_interval: int = within("[1, 10000]", 5)
    ramp: float = within("[0, 1]", 0.04)
    offload: bool = False

    @property
    def density_exception(self) -> str:
        return self.inner.density_exception or "refreshes compute all pairs"

    def begin_generation(self, q: Tensor, site: Site, reserved_bytes: int = 0) -> int:
        reserved_bytes += super().begin_generation(q, site, reserved_bytes)
        device = torch.device("cpu") if self.offload else q.device
        need = site.layers * q.shape[:3].numel() * (q.shape[3] * q.element_size() + 4)
        advice = "use fewer frames or another method" if self.offload else "set offload=True to use the CPU"
        require_memory(f"Re-ttention of {site.layers} layers of one branch", need, reserved_bytes, device, advice)
        return need

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Plan | None:
        if "plan" not in memory or site.step - memory["step"] >= self.refresh_interval:
            memory.update(plan=super().plan(q, k, v, site, memory), step=site.step)
        return memory["plan"]

    def correct(self, result: AttentionOutput, site: Site, memory: dict) -> tuple[Tensor, Tensor]:
        statistics = memory.setdefault(site.branch, {})  # branches of guidance share a plan, but not rho and R
        if statistics.get("step") != memory["step"]:
            out, lse = result.dense()
            log_ratio = (result.lse - lse).clamp(MIN_LOG, 0)
            residual = out - log_ratio.exp()[..., None].to(out.dtype) * result.out
            residual = residual.cpu() if self.offload else residual
            statistics.update(step=memory["step"], log_ratio=log_ratio, residual=residual)
            return out, lse
        log_ratio, residual = statistics["log_ratio"], statistics["residual"].to(result.out.device, non_blocking=True)
        log_ramp = log_ratio.new_full((), math.log(self.ramp) if self.ramp else -math.inf)
        statistics["log_ratio"] = log_ratio.logaddexp(log_ramp).clamp(max=0)
        return log_ratio.exp()[..., None].to(result.out.dtype) * result.out + residual, result.lse - log_ratio
