"""Checks and conversions of video arrays ``[F, H, W, C]``, uint8 or floats in [0, 1]."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDING = 1e-3  # by which floats may exceed [0, 1]


def to_unit_range(video: NDArray) -> NDArray:
    """Return a video as float64 in [0, 1].

    Raises:
        ValueError: the array is no video, or neither uint8 nor floats in [0, 1].
    """
    if video.ndim != 4 or not video.size:
        raise ValueError(f"a video must be [frames, height, width, channels], got {list(video.shape)}")
    if video.dtype == np.uint8:
        return video / 255
    if not np.issubdtype(video.dtype, np.floating):
        raise ValueError(f"a video must be uint8 or floats in [0, 1], got {video.dtype}")
    low, high = float(video.min()), float(video.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("a video must hold finite numbers, got nan or inf")
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise ValueError(f"a float video must be in [0, 1], got {low:.4g} to {high:.4g}: divide bytes by 255")
    return np.asarray(video, np.float64)


def check_same_shape(video: NDArray, reference: NDArray) -> None:
    """Raise ValueError unless both arrays are videos of one shape."""
    if video.ndim != 4 or video.shape != reference.shape:
        raise ValueError(
            "two videos [frames, height, width, channels] must have the same shape, "
            f"got {list(video.shape)} and {list(reference.shape)}"
        )


def to_pair(video: NDArray, reference: NDArray) -> tuple[NDArray, NDArray]:
    """Return two videos of one shape as float64 in [0, 1]."""
    check_same_shape(video, reference)
    return to_unit_range(video), to_unit_range(reference)
