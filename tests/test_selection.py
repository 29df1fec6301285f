"""Selection without a sort keeps what the budgets keep."""

from __future__ import annotations

import pytest
import torch

from dit_sparse.budget import Above, Mass, Top
from dit_sparse.kernels.selection import kept, kept_by_triton
from support import poisoned

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def scores(columns: int, *, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    return spread * torch.randn(1, 2, 3, columns, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def as_map(index: torch.Tensor, count: torch.Tensor, columns: int) -> torch.Tensor:
    live = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    assert ((index >= 0) & (index < columns)).all(), "spare entries are legal numbers too"
    assert (index.diff(dim=-1)[live[..., 1:]] > 0).all(), "the live ones ascend"
    return torch.zeros(*index.shape[:-1], columns, dtype=torch.bool, device=index.device).scatter_reduce(
        -1, index.long(), live, "amax"
    )


def check(table: torch.Tensor, budget) -> None:
    with poisoned():
        index, count = (kept if isinstance(budget, Above) else kept_by_triton)(table, budget)
    assert index.dtype == count.dtype == torch.int32
    assert torch.equal(as_map(index, count, table.shape[-1]), budget.keep(table))


@pytest.mark.parametrize("columns", [1, 2, 7, 64, 100, 513])
@pytest.mark.parametrize("budget", [Top(0.02), Top(0.25), Top(1.0), Mass(0.3), Mass(0.9), Above(0.5)], ids=str)
def test_keeps_what_the_budget_keeps(columns, budget):
    for seed in range(3):
        check(scores(columns, seed=seed), budget)


@pytest.mark.parametrize("budget", [Top(0.3), Mass(0.7)], ids=str)
def test_what_must_be_kept_is_kept(budget):
    table = scores(40)
    table[..., ::9] = torch.inf
    check(table, budget)
    check(torch.full_like(table, torch.inf), budget)


@pytest.mark.parametrize("budget", [Top(0.3), Mass(0.7)], ids=str)
def test_masked_scores_and_huge_ones(budget):
    table = scores(40, spread=1000.0)
    check(table, budget)
    table[..., 10:] = -torch.inf
    check(table, Mass(0.7))


def test_of_equals_the_first_are_kept():
    table = torch.zeros(1, 1, 3, 20, device=DEVICE)
    table[..., 5] = 1.0
    for budget in (Top(0.25), Mass(0.5)):
        index, count = kept_by_triton(table, budget)
        rest = [i for i in range(20) if i != 5][: int(count[0, 0, 0]) - 1]
        assert index[0, 0, 0, : count[0, 0, 0]].tolist() == sorted([5, *rest])
    assert kept_by_triton(table, Top(0.25))[1].unique().tolist() == [5]


def test_negative_zero_is_zero():
    check(torch.tensor([0.0, -0.0, 1.0, -1.0], device=DEVICE).expand(1, 1, 2, 4), Mass(0.6))


def test_on_a_cpu_it_is_the_budget_itself():
    index, count = kept(scores(40).cpu(), Top(0.25))
    assert index.shape[-1] == 10 and (count == 10).all(), "as wide as the fullest row"
