"""Re-ttention: what a sparse softmax lacks, remembered from a dense step.

Source: R. Chen et al., "Re-ttention: Ultra Sparse Visual Generation via Attention Statistical Reshape",
arXiv:2505.22918, sec. 4. A sparse softmax divides by too little. At a refresh the call is computed both ways, and every
query remembers the share of its softmax that the kept keys M hold, and what the dropped ones add:

    rho = exp(L_M - L),  R = O - rho O_M        the output of this step is O, the dense one
    O = rho O_M + R,  rho <- min(1, rho + ramp)        at the steps between two refreshes

R is the dropped keys' part of the output, kept for a while; rho grows because the dropped keys lose weight as the noise
goes. Any plan will do that does not change between refreshes, so the plan is kept as long.

Differs from the authors: R is kept a head, not after the output projection, which is the same in other words; their
ramp has no bound; they keep a window in every frame (``Window`` here), and any method can take its place. Their refresh
steps are every fifth of 20 (PixArt) or 50 (CogVideoX), after 10-30 % dense ones, at a density of .03 to .06.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..composition import Correction
from ..grid import Site
from ..method import AttentionOutput, Method
from ..plan import Plan
from .window import Window

USUAL = Window()

log = logging.getLogger("dit_sparse")


@dataclass(frozen=True, kw_only=True)
class Rettention(Correction):
    """A correction around any plan.

    Needs ``H * N * (D * bytes + 4)`` bytes for every layer, branch and batch item, says so, and refuses to begin where
    they are not free.

    Attributes:
        every: steps from one refresh to the next.
        ramp: what rho gains a step; the authors use .04.
        offload: keep R on the CPU.
    """

    static = False
    manages_own_plans = True
    inner: Method = USUAL
    every: int = 5
    ramp: float = 0.04
    offload: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1 or self.ramp < 0:
            raise ValueError(f"every is at least 1 and ramp at least 0, not {self.every} and {self.ramp}")

    def begin_generation(self, q: Tensor, site: Site, reserved_bytes: int = 0) -> int:
        reserved_bytes += super().begin_generation(q, site, reserved_bytes)
        device = torch.device("cpu") if self.offload else q.device
        need = site.layers * q.shape[:3].numel() * (q.shape[3] * q.element_size() + 4)
        free = _free(device)
        said = f"Re-ttention keeps {need / 2**30:.2f} GiB on {device} for {site.layers} layers of one branch"
        if need + reserved_bytes > free:
            way_out = "fewer frames or another method" if self.offload else "offload=True keeps it on the CPU"
            taken = f", {reserved_bytes / 2**30:.2f} GiB are for other branches" if reserved_bytes else ""
            raise RuntimeError(f"{said}{taken}, and {free / 2**30:.2f} GiB are free; {way_out}")
        log.info("%s", said)
        return need

    def plan(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Plan | None:
        if "plan" not in memory or site.step - memory["step"] >= self.every:
            memory.update(plan=super().plan(q, k, site, memory), step=site.step)
        return memory["plan"]

    def correct(self, done: AttentionOutput, site: Site, memory: dict) -> tuple[Tensor, Tensor]:
        own = memory.setdefault(site.branch, {})  # branches of guidance share a plan, not what it lacks
        if own.get("step") != memory["step"]:
            out, lse = done.dense()
            ratio = (done.lse - lse).exp()
            residual = out - ratio[..., None].to(out.dtype) * done.out
            own.update(step=memory["step"], ratio=ratio, residual=residual.cpu() if self.offload else residual)
            return out, lse
        ratio, residual = own["ratio"], own["residual"].to(done.out.device, non_blocking=True)
        own["ratio"] = (ratio + self.ramp).clamp(max=1)
        return ratio[..., None].to(done.out.dtype) * done.out + residual, done.lse - ratio.log()


def _free(device: torch.device) -> int:
    """Bytes that are free on a device; of the CPU's memory, what Linux would give without swapping."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 1 << 62)
