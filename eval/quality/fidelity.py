"""Fidelity of a video to a reference: metrics on ``[F, H, W, C]`` arrays, uint8 or floats in [0, 1].

A mean over a clip hides a broken frame, so ``fidelity`` reports every metric for each frame and for the worst tenth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dit_sparse.output.files import json_values

from .lpips_distance import lpips, lpips_by_frame
from .ms_ssim import ms_ssim, scale_count
from .unavailable import Unavailable
from .video_arrays import check_same_shape, to_pair

__all__ = ["Unavailable", "fidelity", "lpips", "ms_ssim", "per_frame", "psnr", "relative_error", "ssim"]

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


def relative_error(latent: ArrayLike | Tensor, reference: ArrayLike | Tensor) -> float:
    """Return ``|latent - reference| / |reference|`` in the Euclidean norm, in float64; inf if the reference is 0.

    Raises:
        ValueError: the shapes differ.
    """
    latent, reference = (torch.as_tensor(x).detach().to("cpu", torch.float64) for x in (latent, reference))
    if latent.shape != reference.shape:
        raise ValueError(f"latents must have the same shape, got {list(latent.shape)} and {list(reference.shape)}")
    error = (latent - reference).norm()
    return float(error / reference.norm()) if error else 0.0


def per_frame(metric: Metric, video: NDArray, reference: NDArray) -> list[float]:
    """Return a metric of every single frame."""
    check_same_shape(video, reference)
    return [metric(video[i : i + 1], reference[i : i + 1]) for i in range(len(video))]


def summary_statistics(values: Sequence[float], larger_is_better: bool = True) -> dict[str, float]:
    """Return ``mean``, ``median`` and ``worst_decile``, the mean of the worst tenth of the values, at least one.

    The mean of PSNRs is inf if one of them is; median and worst decile are more informative then.

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("summary statistics need at least one value, got none")
    ordered = np.sort(np.asarray(values, np.float64))[:: 1 if larger_is_better else -1]
    worst = ordered[: max(1, len(ordered) // 10)]
    return {"mean": float(ordered.mean()), "median": float(np.median(ordered)), "worst_decile": float(worst.mean())}


def fidelity(video: NDArray, reference: NDArray) -> dict[str, dict]:
    """Return all fidelity metrics of a video, ready for a JSON file.

    Returns:
        For each of psnr, ssim, ms_ssim and lpips: ``pooled`` over the clip, ``frames``, and `summary_statistics` of the
        frames; for ms_ssim also ``scales``. lpips may be ``{"unavailable": reason}``. The infinite PSNR of identical
        frames is ``"inf"``, which ``float`` reads.

    Raises:
        ValueError: the shapes differ, or an array is no video.
    """
    result = {"psnr": _summarize(per_frame(psnr, video, reference), pooled=psnr(video, reference))}
    for metric in (ssim, ms_ssim):
        result[metric.__name__] = _summarize(per_frame(metric, video, reference))
    result["ms_ssim"]["scales"] = scale_count(*video.shape[1:3])
    try:
        result["lpips"] = _summarize(lpips_by_frame(video, reference), larger_is_better=False)
    except Unavailable as error:
        result["lpips"] = {"unavailable": str(error)}
    return result


def _summarize(frames: list[float], pooled: float | None = None, larger_is_better: bool = True) -> dict:
    statistics = summary_statistics(frames, larger_is_better)
    return json_values({"pooled": statistics["mean"] if pooled is None else pooled, **statistics, "frames": frames})
