"""Fidelity of a video to a reference: metrics on ``[F, H, W, C]`` arrays, uint8 or floats in [0, 1].

A mean over a clip hides a broken frame, so ``fidelity`` reports metrics for each frame and for the worst tenth.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dit_sparse.output.files import json_values

from .lpips_distance import lpips
from .measures import MEASURES
from .ms_ssim import ms_ssim, scale_count
from .pixel_measures import per_frame, psnr, ssim
from .unavailable import Unavailable
from .video_arrays import to_pair

__all__ = ["Unavailable", "fidelity", "lpips", "ms_ssim", "per_frame", "psnr", "relative_error", "ssim"]


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


def fidelity(
    video: NDArray, reference: NDArray, fps: float = 8, measures: Sequence[str] = tuple(MEASURES)
) -> dict[str, dict]:
    """Return measures of fidelity of a video, ready for a JSON file.

    Args:
        video, reference: ``[F, H, W, C]``, uint8 or floats in [0, 1].
        fps: frame rate in frames per second, for measures of motion.
        measures: keys of `MEASURES`. Default: all.

    Returns:
        For each measure: ``pooled`` over the clip, ``frames``, and `summary_statistics` of the frames; cvvdp has no
        values of frames, and ms_ssim also has ``scales``. A measure may be ``{"unavailable": reason}``. The infinite
        PSNR of identical frames is ``"inf"``, which ``float`` reads.

    Raises:
        ValueError: the shapes differ, or an array is no video.
    """
    to_pair(video, reference)
    result = {name: _scores(name, video, reference, fps) for name in measures}
    if "pooled" in result.get("ms_ssim", ()):
        result["ms_ssim"]["scales"] = scale_count(*video.shape[1:3])
    return result


def _scores(name: str, video: NDArray, reference: NDArray, fps: float) -> dict:
    measure = MEASURES[name]
    try:
        pooled, frames = measure.score(video, reference, fps)
    except Unavailable as error:
        return {"unavailable": str(error)}
    if frames is None:
        return json_values({"pooled": pooled})
    return json_values({"pooled": pooled, **summary_statistics(frames, measure.larger_is_better), "frames": frames})
