"""Scores to lists of kept blocks: where a GPU computes them without a sort, and without waiting for it but where that
saves much memory."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.budget import Budget, Mass, Top
from dit_sparse.plan import check_rows, compact, width_of

WIDEST = 8192  # scores that a program holds in its registers


def kept(scores: Tensor, budget: Budget) -> tuple[Tensor, Tensor]:
    """What ``budget.keep(scores)`` keeps, as index and count of a plan.

    Args:
        scores: float32 ``[B, H, Qb, Kb]``; +inf is always kept.

    Returns:
        index int32 ``[B, H, Qb, K]``, ascending, and count int32 ``[B, H, Qb]``. K is the fullest row's count, or all
        columns where learning it would wait for a GPU and save little memory. Of blocks whose mass rounding decides, a
        GPU may keep others.
    """
    plain = isinstance(budget, Top) or (isinstance(budget, Mass) and budget == Mass(budget.share))
    if scores.is_cuda and plain and scores.shape[-1] <= WIDEST:
        index, count = kept_by_triton(scores, budget)
        check_rows(count)
        return index[..., : width_of(count, scores.shape[-1])].contiguous(), count
    return compact(budget.keep(scores))


def kept_by_triton(scores: Tensor, budget: Top | Mass) -> tuple[Tensor, Tensor]:
    """`kept`, in one launch; on a CPU only where Triton interprets."""
    from .selection_triton import select

    arguments = launch(scores, budget)
    with torch.cuda.device_of(scores):
        select[(scores.shape[:-1].numel(),)](**arguments)
    return arguments["index"], arguments["count"]


def launch(scores: Tensor, budget: Top | Mass) -> dict:
    """The arguments of the kernel; it fills ``index`` and ``count``."""
    columns = scores.shape[-1]
    by_mass = isinstance(budget, Mass)
    width = max(16, 1 << (columns - 1).bit_length())
    return dict(
        scores=scores.float().contiguous(),
        index=torch.zeros(*scores.shape[:-1], columns, dtype=torch.int32, device=scores.device),
        count=torch.empty(scores.shape[:-1], dtype=torch.int32, device=scores.device),
        columns=columns,
        wanted=budget.share if by_mass else float(budget.blocks_of(columns)),
        BY_MASS=by_mass,
        WIDTH=width,
        num_warps=max(1, min(8, width // 256)),
    )
