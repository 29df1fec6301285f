"""Bootstrap intervals for a mean over prompts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dit_sparse.eval.comparison.summary import confidence_interval


def test_interval_agrees_with_the_normal_distribution():
    values = np.random.default_rng(1).normal(30, 2, 60)
    low, high = confidence_interval(values)
    half = 1.96 * values.std() / math.sqrt(60)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1)


def test_interval_of_few_prompts_is_between_their_values():
    """A quarter of the means of two drawn values are the lower one, and a quarter the higher one."""
    assert confidence_interval([1.0, 5.0]) == [1, 5]
    low, high = confidence_interval([0.0] * 99 + [100.0])
    assert low == 0 and 2 <= high <= 4


def test_paired_differences_narrow_the_interval():
    rng = np.random.default_rng(2)
    prompts, noise = rng.normal(0, 5, 12), rng.normal(0, 0.1, 12)
    low, high = confidence_interval((prompts + 1 + noise) - prompts)
    assert 0.8 < low < high < 1.2


def test_one_prompt_and_infinite_values_have_no_interval():
    assert confidence_interval([30.0]) is None and confidence_interval([30.0, math.inf]) is None
    assert confidence_interval([3.0, 3.0]) == [3.0, 3.0]
