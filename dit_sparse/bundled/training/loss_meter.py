"""LossMeter: the progress of a training run, printed."""

import math
import time
from typing import Any

from torch import Tensor


class LossMeter:
    """Running average of the losses at low, middle and high noise levels, printed at most every ``every`` seconds."""

    def __init__(self, every: float = 20.0):
        self.every, self.printed_at, self.losses = every, time.monotonic(), [None, None, None]

    def update(self, levels: Tensor, losses: Tensor) -> None:
        """Add the losses ``[B]`` of samples with noise levels ``[B]``."""
        for third, loss in zip((levels * 3).long().clamp(max=2).tolist(), losses.tolist(), strict=True):
            average = self.losses[third]
            self.losses[third] = loss if average is None else 0.97 * average + 0.03 * loss

    def report(self, trainer: Any, force: bool = False) -> None:
        """Print progress if ``every`` seconds have passed, or if ``force``."""
        if not force and time.monotonic() - self.printed_at < self.every:
            return
        self.printed_at = time.monotonic()
        low, middle, high = (math.nan if loss is None else loss for loss in self.losses)
        seconds_per_step = trainer.elapsed / max(1, trainer.step_count)
        minutes_left = (1 - trainer.fraction) * trainer.budget.minutes
        print(
            f"step {trainer.step_count:5d}  {trainer.fraction:6.1%}  loss at low noise {low:.4f}  middle {middle:.4f}  "
            f"high {high:.4f}  {seconds_per_step:.2f} s/step  {minutes_left:.0f} min left",
            flush=True,
        )
