"""Read, write and compose videos."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .files import atomic_write

MIN_HEIGHT = 384  # pixels; smaller videos are enlarged
INK, PAPER = (29, 36, 48), (252, 252, 251)


def save_video(path: Path, frames: NDArray, fps: int) -> None:
    """Write ``frames [F, H, W, 3]`` uint8 as H.264, enlarged by whole pixels to at least 384 rows."""
    large = _enlarge(frames)
    even = large[:, : large.shape[1] // 2 * 2, : large.shape[2] // 2 * 2]
    with atomic_write(path) as temporary:
        imageio.imwrite(temporary, even, fps=fps, codec="libx264", macro_block_size=2, quality=9)


def read_video(path: Path) -> tuple[NDArray, float]:
    """Return the frames ``[F, H, W, 3]`` uint8 of a video file and its frames per second.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        frames = imageio.imread(path, plugin="FFMPEG")
        return frames, float(imageio.immeta(path, plugin="FFMPEG").get("fps", 8))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot read a video from {path}: {reason}") from None


def side_by_side(left: NDArray, right: NDArray, labels: tuple[str, str]) -> NDArray:
    """Return two clips ``[F, H, W, 3]`` uint8 next to each other, enlarged by whole pixels, a label above each."""
    left, right = _enlarge(left), _enlarge(right)
    bar, gap = 28, 8
    frames, height, width = left.shape[:3]
    canvas = Image.new("RGB", (2 * width + gap, height + bar), PAPER)
    draw = ImageDraw.Draw(canvas)
    for x, label in zip((0, width + gap), labels, strict=True):
        draw.text((x + 4, bar / 2), label, INK, ImageFont.load_default(15), anchor="lm")
    both = np.repeat(np.asarray(canvas)[None], frames, 0)
    both[:, bar:, :width], both[:, bar:, width + gap :] = left, right
    return both


def difference(left: NDArray, right: NDArray, gain: int = 4) -> NDArray:
    """Return ``gain`` times the absolute difference of two clips ``[F, H, W, 3]`` uint8; black where they agree."""
    return (gain * abs(left.astype(int) - right.astype(int))).clip(0, 255).astype(np.uint8)


def _enlarge(frames: NDArray) -> NDArray:
    scale = max(1, -(-MIN_HEIGHT // frames.shape[1]))
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)
