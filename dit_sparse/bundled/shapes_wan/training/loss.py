"""Training losses: a multi-scale squared error of the velocity, and a hinge loss for mismatched prompts."""

import torch.nn.functional as F
from torch import Tensor

MARGIN = 0.3  # by which the loss with a mismatched prompt should exceed the matched one, as a fraction of the latter
CONTRAST_WEIGHT = 3.0  # weight of the hinge loss
CONTRAST_NOISE_LEVELS = (0.8, 0.992)  # noise levels at which the prompt determines which object moves where


def multiscale_loss(error: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted squared error at four scales.

    Adds to the error of the pixels those of the colour (a pixel without its brightness), of means over tokens, and of
    means over 3x3 tokens. The scales do not move the optimum of the flow. The random texture dominates a plain mean,
    but it varies in brightness, not in colour, and cancels in means; with the scales the model learns outlines and
    positions sooner.

    Args:
        error: error of the velocity, ``[B, 12, frames, rows, columns]``, 2x2 places a token.
        weights: of the places, ``[B, frames, rows, columns]``.

    Returns:
        One loss per clip, ``[B]``.
    """
    pixels = error.unflatten(1, (3, -1))
    colour = pixels - pixels.mean(dim=1, keepdim=True)
    tokens = F.avg_pool3d(pixels.mean(2), (1, 2, 2))
    areas = F.avg_pool3d(tokens, (1, 3, 3))
    token_weights = F.avg_pool2d(weights, 2)
    parts = (
        (2.0, pixels, weights),
        (3.0, colour, weights),
        (3.0, tokens, token_weights),
        (4.0, areas, F.avg_pool2d(token_weights, 3)),
    )
    return sum(scale * _weighted_mean(part.square(), weight) for scale, part, weight in parts)


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of ``values [B, ..., frames, rows, columns]``, ``[B]``; weights as above."""
    by_place = values.flatten(1, -4).mean(1)
    return (weights * by_place).sum((1, 2, 3)) / weights.sum((1, 2, 3))


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
