"""Selection in Triton against selection by a sort, and the conversion of masks to lists."""

from __future__ import annotations

import pytest
import torch

from attention_cases import nan_filled_memory
from dit_sparse.budget import Mass, Top
from dit_sparse.density import keep_pairs
from dit_sparse.kernels.key_lists import lists_from_mask
from dit_sparse.kernels.planning.selection import select_top, select_top_by_sort, select_top_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sizes_of_one(scores: torch.Tensor) -> list[torch.Tensor]:
    """Return the sizes of rows and columns of one token each."""
    return [torch.ones(n, device=scores.device) for n in scores.shape[-2:]]


def random_scores(columns: int, *, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    return spread * torch.randn(2, 2, 3, columns, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def eighths(columns: int, rows: int = 3, seed: int = 0) -> torch.Tensor:
    """Return multiples of 1/8, whose sums are exact in any order; some are 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 9, (2, 2, rows, columns), generator=generator).to(DEVICE) / 8


def check(scores: torch.Tensor, target, weights=None, to_nearest: bool = False) -> torch.Tensor:
    with nan_filled_memory():
        kept = select_top_triton(scores, target, weights, to_nearest)
    assert kept.dtype == torch.bool
    assert torch.equal(kept, select_top_by_sort(scores, target, weights, to_nearest))
    return kept


@pytest.mark.parametrize("columns", [1, 2, 7, 64, 100, 513])
def test_top_k(columns):
    scores, targets = random_scores(columns), torch.tensor([0, 1, 3, 1000], device=DEVICE).view(2, 2, 1, 1)
    kept = check(scores, targets)
    assert (kept.sum(-1) == targets[..., 0].clamp(max=columns)).all()
    lowest, highest = scores.masked_fill(~kept, torch.inf), scores.masked_fill(kept, -torch.inf)
    assert (lowest.amin(-1) >= highest.amax(-1)).all()
    for one, expected, target in zip(scores.flatten(0, 1), kept.flatten(0, 1), targets.flatten().tolist(), strict=True):
        assert expected.equal(select_top(one[None, None].cpu(), target)[0, 0].to(DEVICE))
    assert (check(scores[:1, :1], 3).sum(-1) == min(3, columns)).all(), "one number for all rows"


@pytest.mark.parametrize(
    ("columns", "rows", "to_nearest"),
    [(1, 1, True), (7, 1, False), (100, 1, True), (1, 3, False), (7, 3, True), (100, 3, False)],
)
def test_top_scores_by_weight(columns, rows, to_nearest):
    scores, weights = random_scores(columns), eighths(columns, rows)
    targets = torch.tensor([0.0, 0.3, columns / 4, columns + 1.0], device=DEVICE).view(2, 2, 1, 1)
    kept = check(scores, targets, weights, to_nearest)
    check(scores, targets, weights[:1, :1], to_nearest)
    assert not (kept & (weights == 0)).any(), "scores of weight 0 are not kept"
    assert kept[1, 1].equal((weights[1, 1] > 0).expand_as(kept[1, 1])), "the target exceeds the sum of the weights"
    if to_nearest:
        assert (kept.any(-1) == (weights > 0).any(-1)).all(), "the highest score is always kept"


def test_targets_per_row():
    target = torch.arange(12, device=DEVICE).view(2, 2, 3, 1)
    assert check(random_scores(40), target).sum(-1, keepdim=True).equal(target)
    assert check(random_scores(40), target[:1, :, :1]).sum(-1).equal(target[:1, :, :1, 0].expand(2, 2, 3))


@pytest.mark.parametrize("weights", [None, eighths(40)], ids=["without weights", "with weights"])
def test_infinite_scores_are_always_kept(weights):
    scores = random_scores(40)
    scores[..., ::9] = torch.inf
    assert check(scores, 12, weights)[..., ::9].all()
    assert check(torch.full_like(scores, torch.inf), 3, weights).all()
    weightless = torch.where(scores.isposinf(), 0, eighths(40))
    assert (check(scores, 2.5, weightless) & ~scores.isposinf()).any(-1).all(), (
        "infinite scores of weight 0 do not count"
    )


def test_masked_and_huge_scores():
    scores = random_scores(40, spread=1e30)
    check(scores, 9)
    scores[..., 10:] = -torch.inf
    assert check(scores, 9).sum() == check(scores, 30).sum() // 30 * 9
    assert not check(scores, 30.0, scores.softmax(-1))[..., 10:].any()


def test_first_of_equal_scores_are_kept_and_negative_zero_equals_zero():
    scores = torch.tensor([0.0, -0.0, 1.0, -0.0, 0.0, -1.0], device=DEVICE).expand(1, 1, 2, 6)
    assert check(scores, 3)[0, 0, 0].tolist() == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    "keep",
    [
        Top(0.3).keep,
        Mass(0.7).keep,
        Mass(1.0).keep,
        Mass(0.9, min_ratio=0.2, max_ratio=0.4).keep,
        lambda scores: keep_pairs(
            scores, 300, sizes_of_one(scores)[0], (1 + 8 * eighths(60, 1)[0, 0, 0]).to(scores.device)
        ),
        lambda scores: keep_pairs(scores, 50, *sizes_of_one(scores), equal=True, ragged=False),
    ],
    ids=["top", "mass", "all mass", "mass within bounds", "groups", "blocks"],
)
def test_budgets_agree_in_triton_and_pytorch(keep, monkeypatch):
    """Rounding may change one block per row."""
    scores = random_scores(60)
    scores[..., 7] = torch.inf
    expected = keep(scores.cpu())
    monkeypatch.setattr("dit_sparse.kernels.gpu.launching.prefers_triton", lambda x: True)
    kept = keep(scores).cpu()
    assert ((kept != expected).sum(-1) <= 1).all() and (kept != expected).sum() <= 2


@pytest.mark.parametrize("columns", [1, 7, 100])
def test_lists_from_mask(columns):
    keep = random_scores(columns) > 0.5
    keep[..., 0] |= ~keep.any(-1)
    with nan_filled_memory():
        index, count = lists_from_mask(keep)
    is_used = torch.arange(index.shape[-1], device=DEVICE) < count[..., None]
    assert index.dtype == count.dtype == torch.int32 and index.is_contiguous()
    assert ((index >= 0) & (index < columns)).all(), "unused entries are valid numbers"
    assert (index.diff(dim=-1)[is_used[..., 1:]] > 0).all(), "entries ascend"
    assert torch.zeros_like(keep).scatter_reduce(-1, index.long(), is_used, "amax").equal(keep)
    if DEVICE == "cpu":
        assert index.shape[-1] == count.max(), "as wide as the fullest row"
