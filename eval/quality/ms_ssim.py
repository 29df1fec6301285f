"""Multi-scale structural similarity (MS-SSIM) of videos."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .video_arrays import to_pair

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW, SIGMA = 11, 1.5


def ms_ssim(video: NDArray, reference: NDArray) -> float:
    """Return the multi-scale structural similarity in [0, 1], the mean over frames and channels.

    As in Z. Wang, E. Simoncelli, A. Bovik, Asilomar 2003: contrast and structure at every scale, luminance only at the
    last, each to the power of its published weight. The next scale is the mean of 2 x 2 pixels; edges are repeated
    where a side is odd. Windows are Gaussian, 11 x 11 pixels, sigma 1.5, without padding; negative means count as 0.

    Small frames have fewer than 5 scales, those whose sides are at least 11 pixels (`scale_count`), with the first
    weights rescaled to sum 1; below 11 pixels the only scale has the largest odd window that fits. Values are therefore
    comparable only between videos of one size.
    """
    video, reference = to_pair(video, reference)
    return float(np.mean([_ms_ssim_of_frame(a, b) for a, b in zip(video, reference, strict=True)]))


def scale_count(height: int, width: int) -> int:
    """Return how many of its 5 scales ``ms_ssim`` uses for frames of this size."""
    side, scales = min(height, width), 1
    while scales < len(SCALE_WEIGHTS) and -(-side // 2) >= WINDOW:
        side, scales = -(-side // 2), scales + 1
    return scales


def _ms_ssim_of_frame(a: NDArray, b: NDArray) -> float:
    scales = scale_count(*a.shape[:2])
    window = _gaussian(min(WINDOW, *a.shape[:2]))
    x, y = (torch.from_numpy(frame).permute(2, 0, 1) for frame in (a, b))
    product = torch.ones(a.shape[2], dtype=torch.float64)
    for scale, weight in enumerate(SCALE_WEIGHTS[:scales]):
        if scale:
            x, y = _downsample(x), _downsample(y)
        luminance, contrast = _ssim_factors(x, y, window)
        factor = contrast * luminance if scale == scales - 1 else contrast
        product *= factor.mean((1, 2)).clamp(min=0) ** (weight / sum(SCALE_WEIGHTS[:scales]))
    return float(product.mean())


def _gaussian(side: int) -> Tensor:
    half = (side - 1) // 2
    taps = torch.exp(-(torch.arange(-half, half + 1, dtype=torch.float64) ** 2) / (2 * SIGMA**2))
    return taps / taps.sum()


def _ssim_factors(x: Tensor, y: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Return luminance, and contrast times structure, at every position of the window: ``[C, H', W']``."""
    mean_x, mean_y, power, product = _filter(torch.stack([x, y, x * x + y * y, x * y]), window)
    variances, covariance = power - mean_x**2 - mean_y**2, product - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance, (2 * covariance + c2) / (variances + c2)


def _filter(images: Tensor, window: Tensor) -> Tensor:
    """Filter ``images [..., H, W]`` with a separable window, by sums of slices: float64 convolutions are slow."""
    for axis in (-2, -1):
        size = images.shape[axis] - len(window) + 1
        images = sum(tap * images.narrow(axis, i, size) for i, tap in enumerate(window.tolist()))
    return images


def _downsample(image: Tensor) -> Tensor:
    """Return ``image [C, H, W]`` at half the size, by means of 2 x 2 pixels."""
    height, width = image.shape[1:]
    return F.avg_pool2d(F.pad(image, (0, width % 2, 0, height % 2), mode="replicate"), 2)
