"""How near one video is to another: pure functions on ``[F, H, W, C]`` arrays, uint8 or floats in 0..1."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def psnr(video: NDArray, reference: NDArray) -> float:
    """Peak signal-to-noise ratio in dB over the whole clip; inf for identical videos.

    Raises:
        ValueError: shapes differ, or an array is no video.
    """
    video, reference = _unit(video, reference)
    error = float(np.mean((video - reference) ** 2))
    return float("inf") if error == 0 else float(-10 * np.log10(error))


def ssim(video: NDArray, reference: NDArray) -> float:
    """Structural similarity, the mean over the frames (Z. Wang et al., IEEE TIP 13(4), 2004; by scikit-image).
    Frames smaller than its 7 x 7 window are compared with the largest odd window that fits."""
    from skimage.metrics import structural_similarity

    video, reference = _unit(video, reference)
    side = min(7, *video.shape[1:3])
    window = side - 1 + side % 2
    frames = zip(video, reference, strict=True)
    return float(
        np.mean([structural_similarity(a, b, channel_axis=-1, data_range=1.0, win_size=window) for a, b in frames])
    )


def _unit(video: NDArray, reference: NDArray) -> tuple[NDArray, NDArray]:
    if video.ndim != 4 or video.shape != reference.shape:
        raise ValueError(
            f"two videos [frames, height, width, channels] of one shape are compared, "
            f"not {list(video.shape)} and {list(reference.shape)}"
        )
    return tuple(np.asarray(x, np.float64) / (255 if x.dtype == np.uint8 else 1) for x in (video, reference))
