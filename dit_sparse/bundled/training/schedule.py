"""Budget and learning rate of a training run, averaged weights, and checkpoints."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

EMA_DECAY = 0.995  # per step


@dataclass(frozen=True)
class Budget:
    """Length of the training.

    Attributes:
        minutes: wall-clock minutes, used if ``steps`` is None.
        steps: number of steps, which makes a run repeatable.
    """

    minutes: float = 130.0
    steps: int | None = None

    def fraction(self, step: int, elapsed: float) -> float:
        """Return the fraction of the budget used after ``step`` steps and ``elapsed`` seconds, at most 1."""
        used = step / self.steps if self.steps else elapsed / (60 * self.minutes)
        return min(used, 1.0)


def learning_rate_factor(fraction: float) -> float:
    """Return the factor of the peak learning rate: a short warm-up, a plateau, and a cosine decay to 1/50."""
    warmup = min(1.0, 0.05 + fraction / 0.012)
    decay = max(0.0, (fraction - 0.5) / 0.5)
    return warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * decay)))


def scale_learning_rates(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set every learning rate to ``factor`` times its peak, ``base_lr``."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


@torch.no_grad()
def update_average(averages: Iterable[Tensor], weights: Iterable[Tensor], step: int) -> None:
    """Move averaged weights towards the weights after ``step`` earlier steps."""
    # The decay grows from 0, so that the average does not retain the initial weights.
    decay = min(EMA_DECAY, step / (step + 10))
    torch._foreach_lerp_(list(averages), list(weights), 1 - decay)


def save_atomically(state: dict, path: Path) -> None:
    """Write a checkpoint; an interruption leaves the previous one."""
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    os.replace(partial, path)
