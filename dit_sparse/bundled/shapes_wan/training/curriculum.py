"""Training curriculum: clip sizes, prompt padding and learning rate by the fraction of the budget, and noise levels."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum. Each shard draws one batch and one text length at random.

    Attributes:
        until: fraction of the budget at which the stage ends.
        batches: ``(clips, (frames, rows, columns), shown)``: the size in tokens, and how many of the frames a step
            trains on.
        text_lengths: number of tokens to which prompts are padded at least.
    """

    until: float
    batches: tuple[tuple[int, tuple[int, int, int], int], ...]
    text_lengths: tuple[int, ...]


# Objects have the same size in pixels in all clips. The first stage follows the prompt in short clips and small frames.
# The second shows a few frames of clips of the final size: the distances in time are those of the whole clip, the cost
# is that of the shown frames. The last trains on whole clips. Padding lets cross-attention avoid the prompt, so it is
# introduced gradually, once following the prompt reduces the loss.
CURRICULUM = (
    Stage(
        0.2,
        ((4, (4, 12, 12), 4), (2, (8, 16, 16), 3), (2, (6, 16, 16), 4), (2, (14, 12, 12), 5)),
        (1, 1, 64),
    ),
    Stage(
        0.72,
        (
            (1, (8, 16, 16), 8),
            (2, (8, 16, 16), 4),
            (1, (14, 24, 24), 4),
            (1, (14, 24, 24), 4),
            (2, (14, 16, 16), 4),
            (1, (14, 16, 16), 8),
            (2, (14, 20, 20), 3),
        ),
        (1, 64, 512),
    ),
    Stage(
        1.0,
        (
            (1, (8, 16, 16), 8),
            (1, (8, 16, 16), 8),
            (1, (14, 24, 24), 6),
            (1, (14, 24, 24), 6),
            (1, (14, 24, 24), 14),
        ),
        (512,),
    ),
)

# For a model that already moves objects in short clips. What it does worst are the later frames of a clip, so most
# steps show many frames; small frames make them affordable.
CONTINUATION = (
    Stage(
        0.6,
        (
            (1, (8, 16, 16), 8),
            (1, (8, 16, 16), 8),
            (2, (8, 16, 16), 5),
            (1, (10, 16, 16), 10),
            (2, (14, 12, 12), 7),
            (1, (14, 16, 16), 9),
            (1, (14, 24, 24), 4),
        ),
        (1, 64, 512),
    ),
    Stage(
        1.0,
        (
            (1, (8, 16, 16), 8),
            (1, (8, 16, 16), 8),
            (1, (14, 16, 16), 14),
            (1, (14, 20, 20), 8),
            (1, (14, 24, 24), 6),
            (1, (14, 24, 24), 14),
        ),
        (512,),
    ),
)


def sample_noise_levels(count: int, generator: torch.Generator) -> Tensor:
    """Return noise levels in (0, 1), ``[count]``.

    20 % are logit-normal, 28 % uniform in (0.03, 0.7), and 52 % lie in (0.76, 0.994) with a log-uniform distance to 1.
    An object of a hundred tokens remains visible under noise that hides each single token, so only the highest levels
    teach the model to move it from its place in the first frame as the prompt says.
    """
    kind = torch.rand(count, generator=generator)
    logit_normal = torch.sigmoid(torch.randn(count, generator=generator) + 0.1)
    uniform = torch.rand(count, generator=generator)
    low_or_high = torch.where(kind < 0.48, 0.03 + 0.67 * uniform, 1 - 0.006 * 40**uniform)
    return torch.where(kind < 0.2, logit_normal, low_or_high)
