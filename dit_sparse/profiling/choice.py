"""The choice of a candidate for every head, from measured errors and densities.

If all heads have one density, each takes the candidate with the least error. If densities may differ, the choice is a
Lagrangian: at a price on density every head takes the candidate with the least ``error^2 + price * density``, and the
price is bisected until the mean meets the target. Sparse-vDiT (arXiv:2506.03065) fixes the price and an absolute error
instead; here both follow from the target.

One density is the default, because errors of different heads do not weigh the same in the video: on `shapes-wan`
at density 0.25, moving density to heads with large errors reduces the mean error from 0.16 to 0.11 but makes the video
worse (28.6 instead of 30.1 dB, eight prompts, with a plan for each branch of guidance; 29.0 dB if errors are divided by
the mean energy of the layer's heads instead of each head's own).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .candidates import LETTERS, Candidate

TOLERANCE = 1e-6  # by which the mean density may exceed the target, for rounding
LOWEST_PRICE, HIGHEST_PRICE = 1e-9, 1e9  # at the lowest all heads are dense, at the highest as sparse as possible


def choose_least_error(error: Tensor) -> Tensor:
    """Return the candidate with the least error for every head, except dense attention.

    Args:
        error: squared relative errors, ``[candidates, L, H]``. The first candidate is dense attention.

    Returns:
        Numbers of candidates, int64 ``[L, H]``.
    """
    return 1 + error[1:].argmin(0)


def choose(
    error: Tensor, density: Tensor, target_density: float | None = None, max_error: float | None = None
) -> Tensor:
    """Return a candidate for every head such that the mean density or error meets a target.

    Args:
        error: squared relative errors, ``[candidates, L, H]``.
        density: densities, ``[candidates, L, H]``, or at several lengths of the video, ``[lengths, candidates, L, H]``.
            One candidate is dense, with density 1 and error 0.
        target_density: limit of the mean density, at each length. Minimizes the error.
        max_error: limit of the root mean squared error. Minimizes the density.

    Returns:
        Numbers of candidates, int64 ``[L, H]``.

    Raises:
        ValueError: not exactly one target is given, or no choice meets it.
    """
    if (target_density is None) == (max_error is None):
        raise ValueError("give either a target density or a maximum error")
    density = density.view(-1, *error.shape)
    mean_density = density.mean(0)
    at_price = lambda price: (error + price * mean_density).argmin(0)
    if max_error is not None:
        _, price = _bisect(lambda price: select(error, at_price(price)).mean() > max_error**2)
        return at_price(price)
    meets_target = lambda price: bool((_left(density, at_price(price), target_density) >= 0).all())
    if not meets_target(HIGHEST_PRICE):
        raise ValueError(f"no candidate is sparse enough for a mean density of {target_density}")
    price, _ = _bisect(meets_target)
    return _spend_rest(error, density, at_price(price), target_density)


def select(table: Tensor, choice: Tensor) -> Tensor:
    """Return the entries of a table ``[candidates, L, H]`` that belong to a choice, ``[L, H]``."""
    return table.gather(0, choice[None])[0]


def assign_letters(candidates: Sequence[Candidate], choice: Tensor) -> tuple[dict[str, Candidate], list[str]]:
    """Return the chosen candidates by letter, and a string of letters for every layer."""
    letters = dict(zip(choice.unique().tolist(), LETTERS, strict=False))
    layers = ["".join(letters[number] for number in layer) for layer in choice.tolist()]
    return {letter: candidates[number] for number, letter in letters.items()}, layers


def _bisect(is_high_enough: Callable[[float], bool | Tensor]) -> tuple[float, float]:
    """Return the lowest price that is high enough, and the highest one below it."""
    low, high = LOWEST_PRICE, HIGHEST_PRICE
    for _ in range(80):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if is_high_enough(middle) else (middle, high)
    return high, low


def _left(density: Tensor, choice: Tensor, target: float) -> Tensor:
    """Return by how much the mean density of a choice is below the target at each length, ``[lengths]``."""
    return torch.stack([target + TOLERANCE - select(table, choice).mean() for table in density])


def _spend_rest(error: Tensor, density: Tensor, choice: Tensor, target: float) -> Tensor:
    """Spend the density left below the target: repeat the change of one head that removes most error per density."""
    choice, heads = choice.clone(), choice.numel()
    while True:
        gain = select(error, choice) - error
        cost = torch.stack([(table - select(table, choice)) / heads for table in density])
        fits = (cost <= _left(density, choice, target).view(-1, 1, 1, 1)).all(0)
        value = torch.where((gain > 0) & fits, gain / cost.mean(0).clamp(min=1e-9), -1.0)
        best = int(value.argmax())
        if value.flatten()[best] <= 0:
            return choice
        candidate, head = divmod(best, heads)
        choice.view(-1)[head] = candidate
