"""Top-k and top-p selection in every row of scores; on a GPU without a sort and without synchronization."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels.gpu import launching

MAX_COLUMNS = 8192  # scores of a row that one Triton program holds in registers


def select_top(
    scores: Tensor, target: float | Tensor, weights: Tensor | None = None, *, to_nearest: bool = False
) -> Tensor:
    """Return a mask of the highest scores of each row until the sum of their weights reaches the target.

    Args:
        scores: ``[B, H, Q, K]``; +inf is always kept.
        target: a number, or one for each row, ``[B|1, H|1, Q|1, 1]``.
        weights: of each score, not negative, ``[B, H, Q|1, K]``; scores of weight 0 are not kept. None: all 1, which
            makes the target a number of scores.
        to_nearest: keep the score that crosses the target only if at least half of its weight is below the target. The
            highest score is always kept.

    Returns:
        bool ``[B, H, Q, K]``. Which of equal scores are kept is unspecified. If rounding decides whether a sum reaches
        the target, GPU and CPU may differ.
    """
    if launching.prefers_triton(scores) and scores.shape[-1] <= MAX_COLUMNS:
        return select_top_triton(scores, target, weights, to_nearest)
    if weights is None and isinstance(target, int):
        top = scores.topk(min(target, scores.shape[-1]), dim=-1, sorted=False).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, top, True) | scores.isposinf()
    if weights is None and isinstance(target, Tensor) and not to_nearest and scores.device.type == "cpu":
        return CountSelector(scores).keep(target)
    return select_top_by_sort(scores, target, weights, to_nearest)


class CountSelector:
    """`select_top` of the same scores for several numbers of scores, ``[B|1, H|1, Q|1, 1]``; ranks once on a CPU."""

    def __init__(self, scores: Tensor) -> None:
        self._scores, self._top = scores, None

    def keep(self, target: Tensor) -> Tensor:
        """Return the mask of the highest scores of each row."""
        scores = self._scores
        if scores.device.type != "cpu":
            return select_top(scores, target)
        most = int(target.max().ceil().clamp(0, scores.shape[-1]))
        if self._top is None or self._top.shape[-1] < most:
            self._top = scores.topk(min(most + 2, scores.shape[-1]), dim=-1).indices  # later targets differ little
        keep = (torch.arange(self._top.shape[-1]) < target).expand(self._top.shape)
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, self._top, keep) | scores.isposinf()


def select_top_by_sort(
    scores: Tensor, target: float | Tensor, weights: Tensor | None, to_nearest: bool = False
) -> Tensor:
    """`select_top` by a stable sort: of equal scores, the first are kept."""
    sorted_scores, column = scores.sort(dim=-1, descending=True, stable=True)
    if weights is None:
        weights = scores.new_ones(())
    weight = weights.to(scores.dtype).expand_as(scores).gather(-1, column)
    before = weight.cumsum(-1) - weight
    fits = (before + weight / 2 <= target) | (before == 0) if to_nearest else before < target
    keep = fits & (weight > 0) | sorted_scores.isposinf()
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, column, keep)


def select_top_triton(
    scores: Tensor, target: float | Tensor, weights: Tensor | None, to_nearest: bool = False
) -> Tensor:
    """`select_top_by_sort` in one launch; on a CPU only with Triton's interpreter."""
    from dit_sparse.kernels.gpu.selection import select_top_kernel

    arguments, keep = launch_arguments(scores, target, weights, to_nearest)
    with torch.cuda.device_of(scores):
        select_top_kernel[(scores.shape[:-1].numel(),)](**arguments)
    return keep.view(torch.bool)


def launch_arguments(
    scores: Tensor, target: float | Tensor, weights: Tensor | None, to_nearest: bool
) -> tuple[dict, Tensor]:
    """Return the arguments of the kernel, and its output: the mask as int8."""
    rows, columns = scores.shape[:-1], scores.shape[-1]
    width = max(16, 1 << (columns - 1).bit_length())
    if not isinstance(target, Tensor):
        target = torch.full((1,), target, dtype=torch.float32, device=scores.device)
    keep = torch.empty(scores.shape, dtype=torch.int8, device=scores.device)
    arguments = dict(
        scores=scores.float().contiguous(),
        weights=None if weights is None else weights.expand(*rows[:-1], -1, -1).float().contiguous(),
        keep=keep,
        target=target.float().expand(*rows, 1).contiguous(),
        columns=columns,
        rows_per_weight=1 if weights is None else rows[-1] // weights.shape[-2],
        TO_NEAREST=to_nearest,
        WIDTH=width,
        num_warps=max(1, min(8, width // 256)),
    )
    return arguments, keep
