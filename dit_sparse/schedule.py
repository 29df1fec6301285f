"""When to stay dense and when to plan anew; never what."""

from __future__ import annotations

from dataclasses import dataclass

from .grid import Site


@dataclass(frozen=True)
class Schedule:
    """Which calls are sparse at all, and which of them make a new plan.

    Attributes:
        dense_steps: the first denoising steps stay dense: a count (int) or a fraction of all steps (float, floored).
            They settle the layout of the video; nearly every paper keeps 10-30 % of them, Radial Attention 24 %. Every
            pair is computed in them, by torch's own attention or by an executor that "auto" has measured to be faster.
        dense_layers: the first layers stay dense in every step: a count or a fraction.
        every: a plan is made anew after this many sparse steps. Attention changes slowly: on the bundled model every
            second step costs at most 0.9 dB, mostly nothing, and half the planning. Static patterns are planned once
            per grid anyway.
        per_branch: whether each of the two branches of guidance has its own plans. By default the one that is computed
            first, or in a batch of both that of the prompt, plans for both. This halves the planning, and guidance,
            which enlarges what differs between the branches, has no difference of plans to enlarge: 0.1 to 7 dB on the
            bundled model.
    """

    dense_steps: int | float = 0.25
    dense_layers: int | float = 0
    every: int = 2
    per_branch: bool = False

    def __post_init__(self) -> None:
        for name in ("dense_steps", "dense_layers"):
            value = getattr(self, name)
            if not value >= 0 or (isinstance(value, float) and value > 1):
                raise ValueError(f"{name} is a count (int) or a fraction between 0.0 and 1.0, not {value!r}")
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every is a number of steps, at least 1, not {self.every}")

    def dense(self, site: Site) -> bool:
        """Raises ValueError when a fraction of the steps is asked for and their number is unknown."""
        return site.layer < _count(self.dense_layers, site.layers) or site.step < self.first_sparse_step(site.steps)

    def replan(self, site: Site) -> bool:
        return (site.step - self.first_sparse_step(site.steps)) % self.every == 0

    def first_sparse_step(self, steps: int | None) -> int:
        if isinstance(self.dense_steps, float) and self.dense_steps and steps is None:
            raise ValueError(
                f"dense_steps={self.dense_steps} is a fraction, but the number of steps is unknown here: "
                "give a count, or pass steps= to enable"
            )
        return _count(self.dense_steps, steps)


def _count(amount: int | float, total: int | None) -> int:
    return int(amount * total + 1e-9) if isinstance(amount, float) and total is not None else int(amount)
