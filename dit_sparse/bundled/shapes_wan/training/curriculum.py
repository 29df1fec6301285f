"""Training curriculum: clip sizes, prompt padding and learning rate by the fraction of the budget, and noise levels."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum. Each shard draws one batch and one text length at random.

    Attributes:
        until: fraction of the budget at which the stage ends.
        batches: ``(clips, (frames, rows, columns))``, the size in tokens.
        text_lengths: number of tokens to which prompts are padded at least.
    """

    until: float
    batches: tuple[tuple[int, tuple[int, int, int]], ...]
    text_lengths: tuple[int, ...]


# Objects have the same size in pixels in all clips. In the smallest clips they fill a fifth of the frame or more: pure
# noise contains no information about position, so the loss reduction by a prompt grows with the square of that share.
# The second stage adds pairs of objects. Large frames are trained in short clips and long clips in small frames, where
# both are cheap; the last stages combine them. Padding lets cross-attention avoid the prompt, so it is introduced
# gradually, once following the prompt reduces the loss.
CURRICULUM = (
    Stage(0.2, ((4, (4, 12, 12)), (6, (3, 10, 10)), (4, (2, 16, 16)), (2, (12, 10, 10))), (1, 1, 1, 64)),
    Stage(
        0.75,
        ((2, (6, 16, 16)), (2, (5, 16, 16)), (3, (4, 16, 16)), (2, (3, 20, 20)), (2, (4, 18, 20)), (2, (14, 10, 10))),
        (1, 1, 64),
    ),
    Stage(
        0.9, ((1, (8, 16, 16)), (2, (6, 16, 16)), (2, (4, 20, 20)), (1, (21, 10, 10)), (1, (6, 20, 20))), (1, 64, 512)
    ),
    Stage(0.96, ((1, (8, 16, 16)), (2, (6, 16, 16)), (1, (8, 20, 20)), (1, (14, 16, 16))), (64, 128, 512)),
    Stage(1.0, ((1, (21, 20, 20)), (1, (8, 16, 16)), (2, (6, 16, 16)), (1, (12, 20, 20))), (512,)),
)


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


def sample_noise_levels(count: int, generator: torch.Generator) -> Tensor:
    """Return noise levels in (0, 1), ``[count]``.

    10 % are logit-normal, 27 % uniform in (0.03, 0.6), and 63 % lie in (0.76, 0.994) with a log-uniform distance to 1.
    An object of a hundred tokens remains visible under noise that hides each single token: at 0.93 its position and
    colour can still be read from the noisy clip, so only higher levels teach the model to follow the prompt. At about
    0.97 a moving object is visible in all frames together but not in any single one; directions are learned there.
    """
    kind = torch.rand(count, generator=generator)
    logit_normal = torch.sigmoid(torch.randn(count, generator=generator) + 0.1)
    uniform = torch.rand(count, generator=generator)
    low_or_high = torch.where(kind < 0.37, 0.03 + 0.57 * uniform, 1 - 0.006 * 40**uniform)
    return torch.where(kind < 0.1, logit_normal, low_or_high)
