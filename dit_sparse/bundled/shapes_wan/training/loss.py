"""Training losses: a multi-scale squared error of the velocity, and a hinge loss for mismatched prompts."""

import torch.nn.functional as F
from torch import Tensor

MARGIN = 0.3  # by which the loss with a mismatched prompt should exceed the matched one, as a fraction of the latter
CONTRAST_WEIGHT = 3.0  # weight of the hinge loss
CONTRAST_NOISE_LEVELS = (0.8, 0.992)  # noise levels at which the prompt determines which object moves where


def multiscale_loss(error: Tensor) -> Tensor:
    """Return the squared error at four scales.

    Adds to the error of the pixels those of the colour (a pixel without its brightness), of means over tokens, and of
    means over 3x3 tokens. The weights do not move the optimum of the flow. The random texture cannot be predicted and
    dominates a plain mean, but it varies in brightness, not in colour, and cancels in means; with these weights the
    model learns outlines and positions several times sooner.

    Args:
        error: error of the velocity, ``[B, 48, frames, rows, columns]``.

    Returns:
        One loss per clip, ``[B]``.
    """
    pixels = error.unflatten(1, (3, -1))
    colour = pixels - pixels.mean(dim=1, keepdim=True)
    tokens = pixels.mean(2)
    areas = F.avg_pool3d(tokens, (1, 3, 3))
    parts = zip((1.0, 4.0, 4.0, 7.0), (pixels, colour, tokens, areas), strict=True)
    return sum(weight * part.square().flatten(1).mean(1) for weight, part in parts)


def contrast_loss(matched: Tensor, mismatched: Tensor) -> Tensor:
    """Return the weighted hinge loss that makes a mismatched prompt predict a clip worse than the matched one.

    The difference of the two losses depends on the prompt only. In the loss of the clip alone, the gradient of the
    prompt is too small to learn from.

    Args:
        matched: losses of clips with their own prompts, ``[B]``.
        mismatched: losses of the same clips and noise with mismatched prompts, ``[B]``.

    Returns:
        ``[B]``.
    """
    return CONTRAST_WEIGHT * F.relu(MARGIN * matched.detach() + matched - mismatched)
