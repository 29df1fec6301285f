"""Which attention calls stay dense, and which sparse calls make a new plan."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from .grid import Site, short_repr


@dataclass(frozen=True)
class Schedule:
    """Dense steps, dense layers and the interval between two plans.

    Attributes:
        dense_steps: first denoising steps that stay dense: a count (int) or a fraction of all steps (float, rounded
            down). These steps settle the layout of the video; most papers keep 10-30 % of them, Radial Attention 24 %.
            They are computed by SDPA, or by an executor that "auto" has measured to be faster.
        dense_layers: first layers that stay dense in every step: a count or a fraction.
        replan_interval: sparse steps between two plans. Attention changes slowly: on the bundled model an interval of 2
            costs at most 0.9 dB, mostly nothing, and halves the planning. Static patterns are planned once per grid.
        per_branch: whether each branch of classifier-free guidance has plans of its own. By default the branches share
            them: the first one computed makes the plan, or the conditional one if a batch holds both. Sharing halves
            the planning and gains 0.1 to 7 dB on the bundled model, because guidance amplifies differences between
            the branches, and two plans are such a difference.
    """

    dense_steps: int | float = 0.25
    dense_layers: int | float = 0
    replan_interval: int = 2
    per_branch: bool = False

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

    def is_dense(self, site: Site) -> bool:
        """Return whether a call stays dense.

        Raises:
            ValueError: ``dense_steps`` is a fraction and the number of steps is unknown.
        """
        return site.layer < _count(self.dense_layers, site.layers) or site.step < self.first_sparse_step(site.steps)

    def first_sparse_step(self, steps: int | None) -> int:
        """Return the number of dense steps among ``steps``. Raises as :meth:`is_dense` does."""
        if isinstance(self.dense_steps, float) and self.dense_steps and steps is None:
            raise ValueError(
                f"dense_steps={self.dense_steps} is a fraction, but the number of steps is unknown: "
                "give a count, or pass steps= to enable"
            )
        return _count(self.dense_steps, steps)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _count(amount: int | float, total: int | None) -> int:
    return int(amount * total + 1e-9) if isinstance(amount, float) and total is not None else int(amount)
