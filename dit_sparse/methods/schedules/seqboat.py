"""SeqBoat (sparse modular activation): only active queries attend, the others keep the result of an earlier step.

Source: L. Ren et al., "Sparse Modular Activation for Efficient Sequence Modeling", arXiv:2306.11197, sec. 3. A module
computes only the active elements of a sequence, which are gathered, computed and scattered back; the others skip it.
With the mean query c_i of block i now, and the mean query c'_i when its output was computed, the density determines how
many rows are active, those with the greatest change

    |c_i - c'_i|^2 / |c'_i|^2

An active row attends to all keys. A row that is not active keeps its output of an earlier step.

Planning: N D additions (mean queries of 64).

Differs from the authors:
- They train a gate that decides what is active. Here it is the change of the queries, so rows whose keys or values
  change alone stay as they are. With few steps the queries change much from step to step: on `shapes-wan`, eight
  steps, density 0.25, two prompts, clips have 21.6 dB (random blocks: 20.7 dB).
- Their active elements attend to each other; here to all keys.
- The first output is that of the last dense step, or all rows of the first step are active.
- Text rows are always active, and a row that is not active still computes text and its own block, because plans have
  no empty rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...density import VideoBlocks, video_blocks
from ...grid import Site
from ...kernels.planning.selection import select_top
from ...method import AttentionOutput, Method, shared_memory
from ...plan import Plan
from ...scoring import pool
from ..corrections.rettention import require_memory


@dataclass(frozen=True, kw_only=True)
class SeqBoat(Method):
    """Active rows of queries.

    Needs ``H * N * D * bytes`` bytes for every layer, branch and batch item. It logs this, and raises before the
    generation if the memory is not free.

    Attributes:
        density: 0.25 if None.
    """

    density_exception: ClassVar[str] = "whole rows are active, and a first step without an earlier one computes all"
    manages_own_plans: ClassVar[bool] = True
    observes_dense: ClassVar[bool] = True
    reuses_outputs: ClassVar[bool] = True

    def begin_generation(self, q: Tensor, site: Site, reserved_bytes: int = 0) -> int:
        need = site.layers * q.numel() * q.element_size()
        require_memory(
            f"SeqBoat of {site.layers} layers of one branch", need, reserved_bytes, q.device, "use fewer frames"
        )
        return need

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Plan:
        state, now = _state(memory, site), pool(q, site.block)
        if state["is_planned"]:  # the last plan was not computed, so outputs are older than the queries
            state["outputs"].clear()
        then = state["queries"] if state["outputs"] else now
        change = (now - then).square().sum(-1) / then.square().sum(-1).clamp(min=1e-12)
        blocks = video_blocks(site.grid, site.block, q.device)
        scores = change[..., None].expand(-1, -1, -1, change.shape[-1])
        keep = blocks.choose(
            scores, lambda scores: blocks.own | self._is_active(scores[..., 0], blocks, site)[..., None]
        )
        state.update(queries=torch.where(keep.all(-1, keepdim=True), now, then), is_planned=True)
        return Plan.from_mask(keep, site.grid.tokens, site.block)

    def _is_active(self, change: Tensor, blocks: VideoBlocks, site: Site) -> Tensor:
        """Return the rows with the greatest change, bool ``[B, H, V]``; their mean over the heads is the density."""
        pairs = blocks.pairs(0.25 if self.density is None else self.density) - blocks.own_pairs
        rows = max(0.0, pairs / max(1, blocks.tokens**2 - blocks.own_pairs) * len(blocks.sizes))
        first = site.first_head or 0
        head = torch.arange(first, first + change.shape[1], device=change.device, dtype=torch.float64)
        count = ((head + 1) * rows + 0.5).floor() - (head * rows + 0.5).floor()
        return select_top(change[:, :, None], count[:, None, None])[:, :, 0]

    def correct(self, result: AttentionOutput, site: Site, memory: dict) -> tuple[Tensor, Tensor | None]:
        plan, state = result.plan, _state(memory, site)
        state["is_planned"] = False
        if site.branch in state["outputs"]:
            active = (plan.count == plan.blocks)[..., None].repeat_interleave(plan.block, 2)[:, :, : plan.tokens]
            out, lse = torch.where(active, result.out, state["outputs"][site.branch]), None
        else:
            out, lse = result.dense()
        state["outputs"][site.branch] = out
        return out, lse

    def observe_dense(self, result: AttentionOutput, site: Site, memory: dict) -> None:
        state = _state(memory, site)
        state["outputs"][site.branch], _ = result.dense()
        state["is_planned"] = False


def _state(memory: dict, site: Site) -> dict:
    """Return the outputs of a layer by branch, and the mean queries that they were computed for. They do not depend on
    the density, unlike ``memory``, which is dropped when the density changes."""
    return shared_memory(memory).setdefault(site.layer, {"outputs": {}, "is_planned": False})
