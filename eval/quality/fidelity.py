"""How near one video is to another: pure functions on ``[F, H, W, C]`` arrays, uint8 or floats in 0..1.

``fidelity`` is all of it at once: a mean over a clip hides a broken frame, so it gives every frame and the worst tenth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional as F

from dit_sparse.output.files import for_json

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW, SIGMA = 11, 1.5
ALEXNET = "alexnet-owt-7be5be79.pth"
ROUNDING = 1e-3  # that floats may lie beside 0..1
ALEXNET_SIDE = 31  # below, its second pooling has nothing left

Metric = Callable[[NDArray, NDArray], float]


class Unavailable(RuntimeError):
    """A measure that cannot be taken here; the text says what is missing and how to get it."""


def psnr(video: NDArray, reference: NDArray) -> float:
    """Peak signal-to-noise ratio in dB over the whole clip; inf for identical videos.

    Raises:
        ValueError: shapes differ, or an array is no video.
    """
    video, reference = _pair(video, reference)
    error = float(np.mean((video - reference) ** 2))
    return float("inf") if error == 0 else float(-10 * np.log10(error))


def ssim(video: NDArray, reference: NDArray) -> float:
    """Structural similarity, the mean over the frames (Z. Wang et al., IEEE TIP 13(4), 2004; by scikit-image).
    Frames smaller than its 7 x 7 window are compared with the largest odd window that fits; 3 x 3 is the least."""
    from skimage.metrics import structural_similarity

    video, reference = _pair(video, reference)
    side = min(7, *video.shape[1:3])
    window = side - 1 + side % 2
    if window < 3:
        raise ValueError(f"ssim needs frames of at least 3 x 3 pixels, not {list(video.shape[1:3])}")
    frames = zip(video, reference, strict=True)
    return float(
        np.mean([structural_similarity(a, b, channel_axis=-1, data_range=1.0, win_size=window) for a, b in frames])
    )


def ms_ssim(video: NDArray, reference: NDArray) -> float:
    """Multi-scale structural similarity in 0..1, the mean over frames and channels (Z. Wang, E. Simoncelli, A. Bovik,
    Asilomar 2003). Contrast and structure at every scale, luminance only at the last, each to the power of its
    published weight; the next scale is the mean of 2 x 2 pixels, edges repeated where a side is odd. Gaussian windows
    of 11 x 11 pixels, sigma 1.5, only where they fit whole; means below 0 count as 0.

    Small frames have fewer than the 5 scales, those whose sides are at least 11 pixels (``scales_of``), and the first
    weights rescaled to sum 1; under 11 pixels the one scale has the largest odd window that fits. So values compare
    only between videos of one size.
    """
    video, reference = _pair(video, reference)
    return float(np.mean([_ms_ssim_of_frame(a, b) for a, b in zip(video, reference, strict=True)]))


def scales_of(height: int, width: int) -> int:
    """How many of its 5 scales ``ms_ssim`` uses for frames of this size."""
    side, scales = min(height, width), 1
    while scales < len(SCALE_WEIGHTS) and -(-side // 2) >= WINDOW:
        side, scales = -(-side // 2), scales + 1
    return scales


def lpips(video: NDArray, reference: NDArray) -> float:
    """Learned perceptual distance, the mean over the frames; smaller is nearer (R. Zhang et al., CVPR 2018,
    arXiv:1801.03924; AlexNet, version 0.1, by the package ``lpips``). On a GPU if there is one.

    Raises:
        Unavailable: the package or AlexNet's weights are not on this machine; nothing is downloaded.
    """
    return float(np.mean(_lpips_of_frames(video, reference)))


def relative_error(latent: ArrayLike | Tensor, reference: ArrayLike | Tensor) -> float:
    """``|latent - reference| / |reference|`` in the Euclidean norm, in float64; inf beside a reference of zeros.

    Raises:
        ValueError: shapes differ.
    """
    latent, reference = (torch.as_tensor(x).detach().to("cpu", torch.float64) for x in (latent, reference))
    if latent.shape != reference.shape:
        raise ValueError(f"latents of one shape are compared, not {list(latent.shape)} and {list(reference.shape)}")
    error = (latent - reference).norm()
    return float(error / reference.norm()) if error else 0.0


def per_frame(metric: Metric, video: NDArray, reference: NDArray) -> list[float]:
    """A metric of this file for every frame by itself."""
    _check_shapes(video, reference)
    return [metric(video[i : i + 1], reference[i : i + 1]) for i in range(len(video))]


def spread(values: Sequence[float], larger_is_better: bool = True) -> dict[str, float]:
    """``mean``, ``median`` and ``worst_decile``, the mean of the worst tenth: F // 10 values, at least one. Of PSNRs
    with one inf the mean is inf; the other two say more.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("the spread of no values is undefined")
    ordered = np.sort(np.asarray(values, np.float64))[:: 1 if larger_is_better else -1]
    worst = ordered[: max(1, len(ordered) // 10)]
    return {"mean": float(ordered.mean()), "median": float(np.median(ordered)), "worst_decile": float(worst.mean())}


def fidelity(video: NDArray, reference: NDArray) -> dict[str, dict]:
    """How near a video is to its reference, ready for a JSON file.

    Returns:
        For each of psnr, ssim, ms_ssim, lpips: ``pooled`` over the clip, ``frames``, and their ``spread``; ms_ssim also
        its ``scales``; lpips may be ``{"unavailable": why}``. JSON knows no infinity: identical frames have the PSNR
        ``"inf"``, which ``float`` reads back.

    Raises:
        ValueError: shapes differ, or an array is no video.
    """
    result = {"psnr": _summary(per_frame(psnr, video, reference), pooled=psnr(video, reference))}
    for metric in (ssim, ms_ssim):
        result[metric.__name__] = _summary(per_frame(metric, video, reference))
    result["ms_ssim"]["scales"] = scales_of(*video.shape[1:3])
    try:
        result["lpips"] = _summary(_lpips_of_frames(video, reference), larger_is_better=False)
    except Unavailable as missing:
        result["lpips"] = {"unavailable": str(missing)}
    return result


def unit_range(video: NDArray) -> NDArray:
    """A video as float64 in 0..1. Raises ValueError for what is no video, or neither bytes nor floats in 0..1."""
    if video.ndim != 4 or not video.size:
        raise ValueError(f"a video is [frames, height, width, channels], not {list(video.shape)}")
    if video.dtype == np.uint8:
        return video / 255
    if not np.issubdtype(video.dtype, np.floating):
        raise ValueError(f"a video is uint8 or floats in 0..1, not {video.dtype}")
    least, most = float(video.min()), float(video.max())
    if not np.isfinite([least, most]).all():
        raise ValueError("a video holds values that are no finite numbers")
    if least < -ROUNDING or most > 1 + ROUNDING:
        raise ValueError(f"a video of floats lies in 0..1, not in {least:.4g}..{most:.4g}; divide bytes by 255")
    return np.asarray(video, np.float64)


def _check_shapes(video: NDArray, reference: NDArray) -> None:
    if video.ndim != 4 or video.shape != reference.shape:
        raise ValueError(
            f"two videos [frames, height, width, channels] of one shape are compared, "
            f"not {list(video.shape)} and {list(reference.shape)}"
        )


def _pair(video: NDArray, reference: NDArray) -> tuple[NDArray, NDArray]:
    _check_shapes(video, reference)
    return unit_range(video), unit_range(reference)


def _summary(frames: list[float], pooled: float | None = None, larger_is_better: bool = True) -> dict:
    values = spread(frames, larger_is_better)
    numbers = {"pooled": values["mean"] if pooled is None else pooled, **values}
    return for_json(numbers | {"frames": frames})


def _ms_ssim_of_frame(a: NDArray, b: NDArray) -> float:
    scales = scales_of(*a.shape[:2])
    window = _gaussian(min(WINDOW, *a.shape[:2]))
    x, y = (torch.from_numpy(frame).permute(2, 0, 1) for frame in (a, b))
    product = torch.ones(a.shape[2], dtype=torch.float64)
    for scale, weight in enumerate(SCALE_WEIGHTS[:scales]):
        if scale:
            x, y = _splits_batch(x), _splits_batch(y)
        luminance, contrast = _ssim_parts(x, y, window)
        part = contrast * luminance if scale == scales - 1 else contrast
        product *= part.mean((1, 2)).clamp(min=0) ** (weight / sum(SCALE_WEIGHTS[:scales]))
    return float(product.mean())


def _gaussian(side: int) -> Tensor:
    half = (side - 1) // 2
    taps = torch.exp(-(torch.arange(-half, half + 1, dtype=torch.float64) ** 2) / (2 * SIGMA**2))
    return taps / taps.sum()


def _ssim_parts(x: Tensor, y: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance, and contrast times structure, at every place the window fits: ``[C, H', W']``."""
    mean_x, mean_y, power, product = _smoothed(torch.stack([x, y, x * x + y * y, x * y]), window)
    variances, covariance = power - mean_x**2 - mean_y**2, product - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance, (2 * covariance + c2) / (variances + c2)


def _smoothed(images: Tensor, window: Tensor) -> Tensor:
    """``images [..., H, W]`` under the separable window; sums of slices, for convolutions in float64 are slow."""
    for axis in (-2, -1):
        places = images.shape[axis] - len(window) + 1
        images = sum(tap * images.narrow(axis, i, places) for i, tap in enumerate(window.tolist()))
    return images


def _splits_batch(image: Tensor) -> Tensor:
    """``image [C, H, W]`` by means of 2 x 2 pixels."""
    height, width = image.shape[1:]
    return F.avg_pool2d(F.pad(image, (0, width % 2, 0, height % 2), mode="replicate"), 2)


def shown(path: Path) -> str:
    """A path as a shell reads it, with ~ for the home folder, so that results tell no user's name."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


def _lpips_of_frames(video: NDArray, reference: NDArray, batch: int = 16) -> list[float]:
    _check_shapes(video, reference)
    if min(video.shape[1:3]) < ALEXNET_SIDE:
        raise Unavailable(f"lpips needs frames of at least {ALEXNET_SIDE} x {ALEXNET_SIDE} pixels")
    model, device = _lpips_model()
    distances = []
    for start in range(0, len(video), batch):
        pair = _pair(video[start : start + batch], reference[start : start + batch])
        a, b = (torch.from_numpy(x).permute(0, 3, 1, 2).float().to(device) for x in pair)
        with torch.no_grad():
            distances += model(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1), normalize=True).flatten().tolist()
    return distances


@lru_cache(maxsize=1)
def _lpips_model() -> tuple[torch.nn.Module, str]:
    try:
        from lpips import LPIPS
    except ImportError as error:
        raise Unavailable(f"the package {error.name} is not installed; get it with: pip install lpips") from None
    weights = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if not weights.is_file():
        fetch = "python -c \"import lpips; lpips.LPIPS(net='alex')\""
        raise Unavailable(f"AlexNet's weights {shown(weights)} are not there; get them with: {fetch}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LPIPS(net="alex", verbose=False).eval().to(device), device
