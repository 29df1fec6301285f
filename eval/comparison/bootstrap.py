"""How sure a mean over prompts is: paired bootstrap intervals (B. Efron, "Bootstrap methods: another look at the
jackknife", Ann. Statist. 7(1), 1979). Prompts are drawn again with replacement, the same ones for everything that is
compared, because most of the spread between prompts is shared."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

DRAWS = 4000
SHARE = 0.95


def interval(values: NDArray | list) -> list[float] | None:
    """Where 95 % of the means of redrawn prompts lie, ``[low, high]``, of one value a prompt; None for one prompt.

    For a paired comparison of two methods give the differences, prompt by prompt.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    means = values[_draws(len(values))].mean(1)
    return [float(x) for x in np.quantile(means, [(1 - SHARE) / 2, (1 + SHARE) / 2])]


def _draws(count: int) -> NDArray:
    """Which prompts are drawn, ``[DRAWS, count]``; the same for the same count."""
    return np.random.default_rng(0).integers(0, count, (DRAWS, count))
