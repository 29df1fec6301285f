"""Learned perceptual distances of videos: LPIPS by the package ``lpips``, ST-LPIPS by ``stlpips-pytorch``."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from .unavailable import Unavailable, display_path, import_failure
from .video_arrays import check_same_shape, to_pair

ALEXNET = "alexnet-owt-7be5be79.pth"
MIN_SIDE = 31  # AlexNet's second pooling needs frames of this size
SHIFT_TOLERANT_MIN_SIDE = 21  # smaller feature maps cannot be padded by reflection
BATCH = 16


def lpips(video: NDArray, reference: NDArray) -> float:
    """Return the LPIPS distance, the mean over the frames; lower is more similar.

    R. Zhang et al., CVPR 2018, arXiv:1801.03924, with AlexNet, version 0.1. It runs on a GPU if there is one.

    Raises:
        Unavailable: the package or AlexNet's weights are missing; nothing is downloaded.
    """
    return float(np.mean(lpips_by_frame(video, reference)))


def lpips_by_frame(video: NDArray, reference: NDArray) -> list[float]:
    """Return the LPIPS distance of every frame."""
    check_same_shape(video, reference)
    if min(video.shape[1:3]) < MIN_SIDE:
        raise Unavailable(f"lpips needs frames of at least {MIN_SIDE} x {MIN_SIDE} pixels")
    model, device = _model()
    distances: list[float] = []
    for start in range(0, len(video), BATCH):
        pair = to_pair(video[start : start + BATCH], reference[start : start + BATCH])
        a, b = (torch.from_numpy(x).permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1).to(device) for x in pair)
        with torch.no_grad():
            distances += model(a, b, normalize=True).flatten().tolist()
    return distances


@lru_cache(maxsize=1)
def _model() -> tuple[torch.nn.Module, str]:
    try:
        from lpips import LPIPS
    except ImportError as error:
        raise Unavailable(f"the package {error.name} is not installed; get it with: pip install lpips") from None
    weights = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if not weights.is_file():
        command = "python -c \"import lpips; lpips.LPIPS(net='alex')\""
        raise Unavailable(f"AlexNet's weights {display_path(weights)} are missing; get them with: {command}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LPIPS(net="alex", verbose=False).eval().to(device), device


def shift_tolerant_lpips_by_frame(video: NDArray, reference: NDArray) -> list[float]:
    """Return the ST-LPIPS distance of every frame; 0 for identical frames, lower is more similar.

    A. Ghildyal, F. Liu, "Shift-tolerant Perceptual Similarity Metric", ECCV 2022, arXiv:2207.13686, with AlexNet: small
    shifts of the whole picture, which people do not see, cost less than in LPIPS. It runs on a GPU if there is one.

    Raises:
        Unavailable: the package is missing or cannot be imported, or a side has fewer than 21 pixels.
    """
    side = SHIFT_TOLERANT_MIN_SIDE
    if min(video.shape[1:3]) < side:
        raise Unavailable(f"st_lpips needs frames of at least {side} x {side} pixels")
    model, device = _shift_tolerant_model()
    distances = []
    for pair in zip(*to_pair(video, reference), strict=True):  # its first layer has stride 1: one frame at a time
        a, b = (torch.from_numpy(x).permute(2, 0, 1)[None].float().expand(-1, 3, -1, -1).to(device) for x in pair)
        with torch.no_grad():
            distances.append(float(model(a, b, normalize=True)))
    return distances


@lru_cache(maxsize=1)
def _shift_tolerant_model() -> tuple[torch.nn.Module, str]:
    with import_failure("stlpips-pytorch"):
        from stlpips_pytorch.stlpips import LPIPS as ShiftTolerantLPIPS
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return ShiftTolerantLPIPS(net="alex", variant="shift_tolerant", verbose=False).eval().to(device), device
