"""Which attention calls stay dense, which sparse calls make a new plan, and how the density changes over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from .grid import Site, short_repr


@dataclass(frozen=True)
class Schedule:
    """Dense steps, dense layers, the interval between two plans, and the density of every step.

    Attributes:
        dense_steps: first denoising steps that stay dense: a count (int) or a fraction of all steps (float, rounded
            down). These steps determine the layout of the video; most papers keep 10-30 % of them, Radial Attention 24
            %. They are computed by SDPA, or by an executor that "auto" has measured to be faster.
        dense_layers: first layers that stay dense in every step: a count or a fraction.
        replan_interval: sparse steps between two plans. Attention changes slowly: on `shapes-wan` an interval of 2
            costs at most 0.9 dB, with most methods nothing, and halves the planning time. Static patterns are planned
            once per grid.
        per_branch: whether each branch of classifier-free guidance has plans of its own. By default the branches share
            them: the first one computed makes the plan, or the conditional one if a batch holds both. Sharing halves
            the planning and gains 0.1 to 7 dB on `shapes-wan`, because guidance amplifies differences between the
            branches, such as those caused by different plans.
        density_ramp: factors of the density at the first and at the last sparse step, such as ``(1.3, 0.6)``; linear
            between them and constant between two plans. The factors are scaled so that the mean over the sparse steps
            is the requested density. On `shapes-wan` `Routed` gains 0.35 dB with it (0.05 and 0.7 dB on two
            seeds). None: the ramp of the method, if it has one. ``(1, 1)``: the same density in all steps.
    """

    dense_steps: int | float = 0.25
    dense_layers: int | float = 0
    replan_interval: int = 2
    per_branch: bool = False
    density_ramp: Sequence[float] | None = None

    def __post_init__(self) -> None:
        for name in ("dense_steps", "dense_layers"):
            value = getattr(self, name)
            is_fraction = isinstance(value, float) and 0 <= value <= 1
            if not is_fraction and not (_is_whole(value) and value >= 0):
                raise ValueError(f"{name} must be a count (int) or a fraction in [0.0, 1.0], got {short_repr(value)}")
        if not _is_whole(self.replan_interval) or self.replan_interval < 1:
            given = short_repr(self.replan_interval)
            raise ValueError(f"replan_interval must be a number of steps, at least 1, got {given}")
        if not isinstance(self.per_branch, int) or self.per_branch not in (0, 1):
            raise ValueError(f"per_branch must be true or false, got {short_repr(self.per_branch)}")
        if self.density_ramp is not None:
            object.__setattr__(self, "density_ramp", _check_ramp(self.density_ramp))

    def is_dense(self, site: Site) -> bool:
        """Return whether a call stays dense.

        Raises:
            ValueError: ``dense_steps`` is a fraction and the number of steps is unknown.
        """
        return site.layer < _count(self.dense_layers, site.layers) or site.step < self.first_sparse_step(site.steps)

    def is_last_dense(self, site: Site) -> bool:
        """Return whether a call is dense and the next step of its layer is sparse. Raises as :meth:`is_dense` does."""
        is_last_step = site.step == self.first_sparse_step(site.steps) - 1
        return is_last_step and site.layer >= _count(self.dense_layers, site.layers)

    def density_at(self, site: Site, density: float, ramp: Sequence[float] | None = None) -> float:
        """Return the density of a step; the mean over the sparse steps is ``density``.

        Args:
            site: of the call; of a dense step, the density of the first sparse one is returned.
            density: the requested density. Near 1 the ramp is flattened, so that no step exceeds 1.
            ramp: that of the method, for schedules without one; ignored if the number of steps is unknown.

        Raises:
            ValueError: the schedule has a ramp, and the number of steps is unknown.
        """
        first, last = self.density_ramp or ramp or (1.0, 1.0)
        if site.steps is None and self.density_ramp and first != last:
            raise ValueError("density_ramp needs the number of steps, which is unknown: pass steps= to enable")
        sparse_steps = 0 if site.steps is None else site.steps - self.first_sparse_step(site.steps)
        if sparse_steps < 2 or first == last:
            return density
        step = min(max(site.step - self.first_sparse_step(site.steps), 0), sparse_steps - 1)
        factor = lambda begin: _interval_mean(begin, self.replan_interval, sparse_steps, first, last)
        steepest = max(factor(0), factor((sparse_steps - 1) // self.replan_interval * self.replan_interval)) - 1
        flattened = min(1.0, (1 / density - 1) / steepest) if steepest > 0 else 1.0
        return density * (1 + flattened * (factor(step // self.replan_interval * self.replan_interval) - 1))

    def first_sparse_step(self, steps: int | None) -> int:
        """Return the number of dense steps among ``steps``. Raises as :meth:`is_dense` does."""
        if isinstance(self.dense_steps, float) and self.dense_steps and steps is None:
            raise ValueError(
                f"dense_steps={self.dense_steps} is a fraction, but the number of steps is unknown: "
                "give a count, or pass steps= to enable"
            )
        return _count(self.dense_steps, steps)


def _check_ramp(ramp: object) -> tuple[float, float]:
    """Return the factors of a density ramp as a tuple. Raises ValueError if they are not two positive numbers."""
    is_pair = isinstance(ramp, Sequence) and not isinstance(ramp, str) and len(ramp) == 2
    if not is_pair or not all(isinstance(x, Real) and not isinstance(x, bool) and 0 < x <= 1000 for x in ramp):
        raise ValueError(f"density_ramp must be two positive factors, such as (1.3, 0.6), got {short_repr(ramp)}")
    return float(ramp[0]), float(ramp[1])


def _interval_mean(begin: int, interval: int, steps: int, first: float, last: float) -> float:
    """Return the mean of a linear ramp over the steps of an interval, relative to its mean over all ``steps``."""
    middle = (begin + min(begin + interval, steps) - 1) / 2
    return (first + (last - first) * middle / (steps - 1)) / ((first + last) / 2)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _count(amount: int | float, total: int | None) -> int:
    return int(amount * total + 1e-9) if isinstance(amount, float) and total is not None else int(amount)
