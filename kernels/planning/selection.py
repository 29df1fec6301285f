"""The best of every row of scores: on a GPU without a sort, and without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels.gpu import launching

WIDEST = 8192  # scores that a program holds in its registers


def select_best(
    scores: Tensor, wanted: float | Tensor, weights: Tensor | None = None, *, to_nearest: bool = False
) -> Tensor:
    """The highest scores of each row, until their weights add up to what is wanted; of equals any.

    Args:
        scores: ``[B, H, Q, K]``; +inf is always kept.
        wanted: a number, or one for each row or several, ``[B|1, H|1, Q|1, 1]``.
        weights: of each score, not negative, ``[B, H, Q|1, K]``; what weighs 0 is not kept. None: each weighs 1.
        to_nearest: what crosses the sum is kept only if half of it, or more, lies within; the best one is in any case.

    Returns:
        bool, the shape of the scores. Where rounding decides whether a sum is reached, a GPU may keep more or less.
    """
    if launching.preferred(scores) and scores.shape[-1] <= WIDEST:
        return best_by_triton(scores, wanted, weights, to_nearest)
    if weights is None and isinstance(wanted, int):
        highest = scores.topk(min(wanted, scores.shape[-1]), dim=-1, sorted=False).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, highest, True) | scores.isposinf()
    return best_by_sort(scores, wanted, weights, to_nearest)


def best_by_sort(scores: Tensor, wanted: float | Tensor, weights: Tensor | None, to_nearest: bool = False) -> Tensor:
    """`best`, as it is defined; of equals those that come first."""
    ranked, place = scores.sort(dim=-1, descending=True, stable=True)
    if weights is None:
        weights = scores.new_ones(())
    weight = weights.to(scores.dtype).expand_as(scores).gather(-1, place)
    before = weight.cumsum(-1) - weight
    wins = (before + weight / 2 <= wanted) | (before == 0) if to_nearest else before < wanted
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, place, wins & (weight > 0) | ranked.isposinf())


def best_by_triton(scores: Tensor, wanted: float | Tensor, weights: Tensor | None, to_nearest: bool = False) -> Tensor:
    """`best_by_sort`, in one launch; on a CPU only where Triton interprets."""
    from dit_sparse.kernels.gpu.selection import select

    arguments = launch(scores, wanted, weights, to_nearest)
    with torch.cuda.device_of(scores):
        select[(scores.shape[:-1].numel(),)](**arguments)
    return arguments["keep"].view(torch.bool)


def launch(scores: Tensor, wanted: float | Tensor, weights: Tensor | None, to_nearest: bool) -> dict:
    """The arguments of the kernel; ``keep`` is what it will fill."""
    rows, columns = scores.shape[:-1], scores.shape[-1]
    width = max(16, 1 << (columns - 1).bit_length())
    if not isinstance(wanted, Tensor):
        wanted = torch.full((1,), wanted, dtype=torch.float32, device=scores.device)
    return dict(
        scores=scores.float().contiguous(),
        weights=None if weights is None else weights.expand(*rows[:-1], -1, -1).float().contiguous(),
        keep=torch.empty(scores.shape, dtype=torch.int8, device=scores.device),
        wanted=wanted.float().expand(*rows, 1).contiguous(),
        columns=columns,
        rows_alike=1 if weights is None else rows[-1] // weights.shape[-2],
        NEAREST=to_nearest,
        WIDTH=width,
        num_warps=max(1, min(8, width // 256)),
    )
