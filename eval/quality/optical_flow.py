"""Optical flow between frames, and frames interpolated by it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .unavailable import Unavailable

MAX_SIDE = 256  # the shorter side of a frame is reduced to this
MIN_SIDE = 8


def grey(frame: NDArray) -> NDArray:
    """Return ``frame [H, W, C]`` as luminance, ``[H, W]``."""
    return frame @ (0.299, 0.587, 0.114) if frame.shape[-1] == 3 else frame.mean(-1)


def optical_flow(a: NDArray, b: NDArray) -> NDArray:
    """Return the displacement of pixels from grey frame ``a`` to ``b``: rows and columns, in pixels, ``[2, H, W]``.

    TV-L1 by scikit-image. The faster iterative Lucas-Kanade finds motion in the noise of flat areas.
    """
    from skimage.registration import optical_flow_tvl1
    from skimage.transform import resize

    if min(a.shape) < MIN_SIDE:
        raise Unavailable(f"optical flow needs frames of at least {MIN_SIDE} x {MIN_SIDE} pixels")
    ratio = MAX_SIDE / min(a.shape)
    if ratio >= 1:
        return optical_flow_tvl1(a, b, dtype=np.float32)
    size = tuple(round(side * ratio) for side in a.shape)
    small = optical_flow_tvl1(*(resize(x, size, anti_aliasing=True) for x in (a, b)), dtype=np.float32)
    scale = np.array(a.shape) / size
    return np.stack([resize(axis, a.shape) * factor for axis, factor in zip(small, scale, strict=True)])


def interpolate_midway(before: NDArray, after: NDArray) -> NDArray:
    """Return the frame midway between two, ``[H, W, C]``: the mean of both, warped by half their optical flow."""
    half = optical_flow(grey(before), grey(after)) / 2
    half = _warp(half.transpose(1, 2, 0), -half).transpose(2, 0, 1)
    return (_warp(before, -half) + _warp(after, half)) / 2


def _warp(image: NDArray, flow: NDArray) -> NDArray:
    """Sample ``image [H, W, C]`` at every pixel plus ``flow [2, H, W]``, by cubic splines with repeated borders."""
    from skimage.transform import warp

    positions = np.indices(image.shape[:2]) + flow
    channels = [warp(image[..., c], positions, order=3, mode="edge") for c in range(image.shape[-1])]
    return np.stack(channels, -1)
