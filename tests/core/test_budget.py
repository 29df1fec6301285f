"""Budgets: which blocks of a row of scores are kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention_cases import assert_near
from dit_sparse import Above, Mass, Top


def random_scores(seed: int, forced: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores, a fraction of them +inf, and which are +inf."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3, 7, 11, generator=generator, dtype=torch.float64) * 3
    always = torch.rand(scores.shape, generator=generator) < forced
    return scores.masked_fill(always, torch.inf), always


def rows(*tensors: torch.Tensor):
    return zip(*(x.flatten(0, 2) for x in tensors), strict=True)


def random_required(seed: int) -> torch.Tensor:
    return torch.rand(7, 11, generator=torch.Generator().manual_seed(seed)) < 0.15


@given(st.integers(0, 999), st.floats(0.01, 1))
def test_top_keeps_the_best_of_every_row(seed, density):
    """Required blocks first; blocks of +inf in addition."""
    (scores, unlimited), required = random_scores(seed), random_required(seed)
    keep = Top(density).keep(scores, required)
    assert (keep | ~(unlimited | required)).all()
    number = max(1, round(density * 11))
    for row, free, first, kept in rows(scores, unlimited, required.expand_as(scores), keep):
        ranked = row.masked_fill(first, torch.inf).argsort(descending=True, stable=True).tolist()
        count = max(number, int((first & ~free).sum())) + int(free.sum())
        assert sorted(ranked[:count]) == kept.nonzero().flatten().tolist()


@given(st.integers(0, 999), st.floats(0.01, 0.999))
def test_mass_keeps_the_fewest_blocks_that_reach_top_p(seed, top_p):
    """Required blocks first, and they count; blocks of +inf have no share."""
    (scores, unlimited), required = random_scores(seed), random_required(seed)
    keep = Mass(top_p).keep(scores, required)
    for row, free, first, kept in rows(scores, unlimited, required.expand_as(scores), keep):
        share = row.masked_fill(free, -torch.inf).softmax(0).nan_to_num(0.0)
        expected, total = (free | first).tolist(), float(share[first & ~free].sum())
        for column in share.argsort(descending=True).tolist():
            if total < top_p and not expected[column]:
                expected[column] = True
                total += float(share[column])
        assert kept.tolist() == expected


@given(
    st.integers(0, 999), st.sampled_from([0.3, 0.9]), st.sampled_from([(0, 0.04), (0.2, 0.4), (0.11, 0.6), (0.5, 1)])
)
def test_mass_keeps_a_least_and_a_greatest_number(seed, top_p, ratios):
    """Bounds count blocks with a finite score; the least number is rounded down."""
    (scores, always), (least, greatest) = random_scores(seed), ratios
    scores[..., 3] = torch.where(always[..., 3], torch.inf, -torch.inf)
    keep = Mass(top_p, min_ratio=least, max_ratio=greatest).keep(scores)
    for row, forced, kept in rows(scores, always, keep):
        free = row.masked_fill(forced, -torch.inf)
        expected, total = forced.tolist(), 0.0
        for rank, column in enumerate(free.argsort(descending=True).tolist()):
            is_full = total >= top_p or rank >= max(1, round(greatest * 11))
            if free[column] > -torch.inf and (not is_full or rank < int(least * 11)):
                expected[column] = True
                total += float((free[column] - free.logsumexp(0)).exp())
        assert kept.tolist() == expected


@given(st.integers(0, 999), st.floats(-8, 8))
def test_above_keeps_what_exceeds_the_threshold_and_the_best(seed, threshold):
    scores, always = random_scores(seed)
    keep = Above(threshold).keep(scores)
    assert (keep | ~always).all() and keep.any(-1).all()
    best = scores == scores.amax(-1, keepdim=True)
    assert keep[scores > threshold].all() and (keep <= ((scores > threshold) | best)).all()


@pytest.mark.parametrize("budget", [Top(0.01), Mass(1e-6), Above(1e9)], ids=repr)
def test_every_row_keeps_a_block(budget):
    scores, _ = random_scores(0, forced=0)
    assert (budget.keep(scores).sum(-1) == 1).all()


@pytest.mark.parametrize("budget", [Top(1.0), Mass(1.0), Above(-1e9)], ids=repr)
def test_everything_can_be_kept(budget):
    assert budget.keep(random_scores(0)[0]).all()


@pytest.mark.parametrize("value", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_budgets_are_fractions(value):
    for budget in (Top, Mass):
        with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
            budget(value)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (lambda: Top("x"), "density must be a number, got 'x'"),
        (lambda: Top(True), "density must be a number, got true"),
        (lambda: Mass(0.9, min_ratio=-0.1), r"min_ratio must be in \[0, 1\], got -0.1"),
        (lambda: Mass(0.9, min_ratio=0.5, max_ratio=0.4), "min_ratio must be at most max_ratio, got 0.5 and 0.4"),
        (lambda: Above(float("nan")), r"threshold must be in \[-inf, inf\], got nan"),
        (lambda: Above(None), "threshold must be a number, got none"),
    ],
)
def test_wrong_values_are_named(budget, words):
    with pytest.raises(ValueError, match=words):
        budget()


def test_assert_near_finds_differences():
    """All tests of numbers depend on it."""
    x = torch.tensor([1.0, 2.0, -torch.inf])
    assert_near(x, x, 0)
    assert_near(x + 1e-4, x, 1e-4)
    for wrong in (x * 1.01, x.nan_to_num(neginf=0.0), torch.tensor([1.0, torch.nan, -torch.inf]), x[:2]):
        with pytest.raises(AssertionError):
            assert_near(wrong, x, 1e-3)
