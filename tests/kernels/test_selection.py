"""Selection without a sort keeps what its definition, by a sort, keeps; and lists hold what a map holds."""

from __future__ import annotations

import pytest
import torch

from attention_cases import poisoned
from dit_sparse.budget import Mass, Top, top_tokens
from dit_sparse.kernels.planning.selection import best_by_sort, best_by_triton, select_best
from dit_sparse.plan import lists_from_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def scores(columns: int, *, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    return spread * torch.randn(2, 2, 3, columns, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def eighths(columns: int, rows: int = 3, seed: int = 0) -> torch.Tensor:
    """Weights whose sums are exact in any order; some are 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 9, (2, 2, rows, columns), generator=generator).to(DEVICE) / 8


def check(table: torch.Tensor, wanted, weights=None, to_nearest: bool = False) -> torch.Tensor:
    with poisoned():
        found = best_by_triton(table, wanted, weights, to_nearest)
    assert found.dtype == torch.bool
    assert torch.equal(found, best_by_sort(table, wanted, weights, to_nearest))
    return found


@pytest.mark.parametrize("columns", [1, 2, 7, 64, 100, 513])
@pytest.mark.parametrize("wanted", [0, 1, 3, 1000])
def test_a_number_of_the_highest(columns, wanted):
    for seed in range(3):
        table = scores(columns, seed=seed)
        found = check(table, wanted)
        assert (found.sum(-1) == min(wanted, columns)).all()
        lowest, highest = table.masked_fill(~found, torch.inf), table.masked_fill(found, -torch.inf)
        assert (lowest.amin(-1) >= highest.amax(-1)).all()
        assert found.equal(select_best(table.cpu(), wanted).to(DEVICE))


@pytest.mark.parametrize("to_nearest", [False, True])
@pytest.mark.parametrize("rows", [1, 3], ids=["weights for all rows", "weights of each row"])
@pytest.mark.parametrize("columns", [1, 7, 100])
def test_the_highest_until_their_weights_suffice(columns, rows, to_nearest):
    for seed in range(3):
        weights = eighths(columns, rows, seed)
        for wanted in (0.0, 0.3, columns / 4, columns + 1.0):
            found = check(scores(columns, seed=seed), wanted, weights, to_nearest)
            check(scores(columns, seed=seed), wanted, weights[:1, :1], to_nearest)
            assert not (found & (weights == 0)).any(), "what weighs nothing is not kept"
            if wanted > columns:
                assert found.equal((weights > 0).expand_as(found))
            if to_nearest:
                assert (found.any(-1) == (weights > 0).any(-1)).all(), "the best one is kept in any case"


def test_every_row_may_want_another_number():
    wanted = torch.arange(12, device=DEVICE).view(2, 2, 3, 1)
    assert check(scores(40), wanted).sum(-1, keepdim=True).equal(wanted)
    assert check(scores(40), wanted[:1, :, :1]).sum(-1).equal(wanted[:1, :, :1, 0].expand(2, 2, 3))


@pytest.mark.parametrize("weights", [None, eighths(40)], ids=["alike", "weighed"])
def test_what_must_be_kept_is_kept(weights):
    table = scores(40)
    table[..., ::9] = torch.inf
    assert check(table, 12, weights)[..., ::9].all()
    assert check(torch.full_like(table, torch.inf), 3, weights).all()
    weightless = torch.where(table.isposinf(), 0, eighths(40))
    assert (check(table, 2.5, weightless) & ~table.isposinf()).any(-1).all(), "they leave room where they weigh nothing"


def test_masked_scores_and_huge_ones():
    table = scores(40, spread=1e30)
    check(table, 9)
    table[..., 10:] = -torch.inf
    assert check(table, 9).sum() == check(table, 30).sum() // 30 * 9
    assert not check(table, 30.0, table.softmax(-1))[..., 10:].any()


def test_of_equals_the_first_are_kept_and_negative_zero_is_zero():
    table = torch.tensor([0.0, -0.0, 1.0, -0.0, 0.0, -1.0], device=DEVICE).expand(1, 1, 2, 6)
    assert check(table, 3)[0, 0, 0].tolist() == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    "keep",
    [
        Top(0.3).keep,
        Mass(0.7).keep,
        Mass(1.0).keep,
        Mass(0.9, min_ratio=0.2, max_ratio=0.4).keep,
        lambda table: top_tokens(table, 1 + 8 * eighths(60, 1).to(table.device), 70),
    ],
    ids=["top", "mass", "all mass", "mass within bounds", "tokens"],
)
def test_a_budget_keeps_the_same_without_a_sort(keep, monkeypatch):
    """Up to the one block that rounding decides."""
    table = scores(60)
    table[..., 7] = torch.inf
    expected = keep(table.cpu())
    monkeypatch.setattr("dit_sparse.kernels.gpu.launching.preferred", lambda x: True)
    found = keep(table).cpu()
    assert ((found != expected).sum(-1) <= 1).all() and (found != expected).sum() <= 2


@pytest.mark.parametrize("columns", [1, 7, 100])
def test_lists_hold_what_a_map_holds(columns):
    keep = scores(columns) > 0.5
    keep[..., 0] |= ~keep.any(-1)
    with poisoned():
        index, count = lists_from_mask(keep)
    live = torch.arange(index.shape[-1], device=DEVICE) < count[..., None]
    assert index.dtype == count.dtype == torch.int32 and index.is_contiguous()
    assert ((index >= 0) & (index < columns)).all(), "spare entries are legal numbers too"
    assert (index.diff(dim=-1)[live[..., 1:]] > 0).all(), "the live ones ascend"
    assert torch.zeros_like(keep).scatter_reduce(-1, index.long(), live, "amax").equal(keep)
    if DEVICE == "cpu":
        assert index.shape[-1] == count.max(), "as wide as the fullest row"
