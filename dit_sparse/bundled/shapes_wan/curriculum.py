"""What is trained when: clip sizes, noise levels, learning rate and loss, all by the fraction of the budget spent."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum, up to the fraction `until`: clips per shard with shapes in tokens, and to how many
    tokens prompts are padded at least. Padding is a way out of listening, so it comes when listening pays."""

    until: float
    batches: tuple[tuple[int, tuple[int, int, int]], ...]
    text_lengths: tuple[int, ...]


# Objects have the same size in pixels everywhere. In the smallest clips they fill a fifth of the frame or more: pure
# noise says nothing about places, so what a prompt is worth there grows with the square of that share. The second stage
# brings pairs. Wide frames are learnt in short clips and long clips in small frames, where either is cheap, so that the
# last stages only have to bring the two together.
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
TINY = (Stage(1.0, ((2, (2, 4, 4)),), (24,)),)


@dataclass(frozen=True)
class Budget:
    """How long to train: by the clock, or by steps when the run has to be repeatable."""

    minutes: float = 130.0
    steps: int | None = None

    def fraction(self, step, elapsed):
        spent = step / self.steps if self.steps else elapsed / (60 * self.minutes)
        return min(spent, 1.0)


def learning_rate_factor(fraction):
    """A short warm-up, a plateau, and a cosine down to a fiftieth."""
    warmup = min(1.0, 0.05 + fraction / 0.012)
    decline = max(0.0, (fraction - 0.5) / 0.5)
    return warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * decline)))


def draw_times(count, generator):
    """Noise levels in (0, 1). Six in ten are high and crowd towards one.

    A thing of a hundred tokens shows through noise that hides every single token: at .93 its place and colour can be
    read off. Only beyond that does the prompt decide, so only there is it learnt to be heard. At about .97 a moving
    thing shows in all frames together but in no single one: there directions are learnt.
    """
    kind = torch.rand(count, generator=generator)
    middle = torch.sigmoid(torch.randn(count, generator=generator) + 0.1)
    uniform = torch.rand(count, generator=generator)
    outer = torch.where(kind < 0.37, 0.03 + 0.57 * uniform, 1 - 0.006 * 40**uniform)
    return torch.where(kind < 0.1, middle, outer)


def spread_loss(error):
    """Squared error of (clips, 48, frames, rows, columns), and more of it where it can be predicted.

    Added are the squared errors of the colour (what is left of a pixel without its brightness), of the means over
    tokens, and of the means over 3x3 tokens. No such weighting moves the optimum of a flow, but the grain, which
    nobody can predict and which a plain mean would see above all, is bright or dark, not coloured, and cancels in
    means: outlines and places are learnt several times sooner.
    """
    pixels = error.unflatten(1, (3, -1))
    colour = pixels - pixels.mean(dim=1, keepdim=True)
    token = pixels.mean(2)
    area = F.avg_pool3d(token, (1, 3, 3))
    parts = zip((1.0, 4.0, 4.0, 7.0), (pixels, colour, token, area), strict=True)
    return sum(weight * part.square().flatten(1).mean(1) for weight, part in parts)
