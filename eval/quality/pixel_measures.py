"""PSNR and SSIM of videos ``[F, H, W, C]``, uint8 or floats in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .video_arrays import check_same_shape, to_pair

Metric = Callable[[NDArray, NDArray], float]


def psnr(video: NDArray, reference: NDArray) -> float:
    """Return the peak signal-to-noise ratio in dB over the whole clip; inf for identical videos.

    Raises:
        ValueError: the shapes differ, or an array is no video.
    """
    video, reference = to_pair(video, reference)
    error = float(np.mean((video - reference) ** 2))
    return float("inf") if error == 0 else float(-10 * np.log10(error))


def ssim(video: NDArray, reference: NDArray) -> float:
    """Return the structural similarity, the mean over the frames.

    Z. Wang et al., IEEE TIP 13(4), 2004, by scikit-image. Frames smaller than its 7 x 7 window use the largest odd
    window that fits, at least 3 x 3.
    """
    from skimage.metrics import structural_similarity

    video, reference = to_pair(video, reference)
    side = min(7, *video.shape[1:3])
    window = side - 1 + side % 2
    if window < 3:
        raise ValueError(f"ssim needs frames of at least 3 x 3 pixels, got {list(video.shape[1:3])}")
    settings = {"channel_axis": -1, "data_range": 1.0, "win_size": window}
    frames = zip(video, reference, strict=True)
    return float(np.mean([structural_similarity(a, b, **settings) for a, b in frames]))


def per_frame(metric: Metric, video: NDArray, reference: NDArray) -> list[float]:
    """Return a metric of every single frame."""
    check_same_shape(video, reference)
    return [metric(video[i : i + 1], reference[i : i + 1]) for i in range(len(video))]
