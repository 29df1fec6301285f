"""Read, write and compose videos."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from imageio_ffmpeg import count_frames_and_secs
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..notation.reading import check_regular_file, shorten_path
from .files import atomic_write, to_uint8

_log = logging.getLogger("dit_sparse")

MIN_HEIGHT = 384  # pixels; smaller videos are enlarged
INK, PAPER = (29, 36, 48), (252, 252, 251)


def save_video(path: Path, frames: NDArray, fps: float) -> None:
    """Write ``frames [F, H, W, 3]`` as H.264, enlarged by whole pixels to at least 384 rows.

    H.264 needs even sizes: the last row or column of a larger clip with an odd size is left out, with a warning.

    Raises:
        ValueError: the frames are not ``[F, H, W, 3]``, or a value is not finite.
        OSError: the video is incomplete. The file is then not written.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size or frames.shape[2] < 2:
        raise ValueError(f"a video must be [frames, height, width, 3], got {list(frames.shape)}")
    large = _enlarge(to_uint8(frames))
    height, width = large.shape[1:3]
    even = large[:, : height // 2 * 2, : width // 2 * 2]
    if even.shape != large.shape:
        sizes = f"{even.shape[1]} x {even.shape[2]}, not {height} x {width}"
        _log.warning("the size of %s is %s: H.264 needs even heights and widths", path, sizes)
    with atomic_write(path) as temporary, _one_sentence_per_error(path):
        imageio.imwrite(temporary, even, fps=fps, codec="libx264", macro_block_size=2, quality=9)
        check_video(temporary, len(frames))


def save_image(path: Path, picture: NDArray) -> None:
    """Write a picture ``[H, W, 3]`` uint8 in the format of the suffix."""
    with atomic_write(path) as temporary:
        Image.fromarray(picture).save(temporary)


def check_video(path: Path, frames: int | None = None) -> None:
    """Raise OSError if an MP4 file is incomplete or does not have this number of frames. The encoder reports neither a
    full disk nor that it was killed."""
    if not _has_all_boxes(path) or (frames is not None and count_frames_and_secs(str(path))[0] != frames):
        raise OSError("the video is incomplete")


@contextmanager
def _one_sentence_per_error(path: Path) -> Iterator[None]:
    """Replace the errors of the encoder, which list its command and its output, by one sentence."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0][:100]
        raise OSError(f"{shorten_path(path)} is incomplete: is the disk full? ({reason})") from None


def _has_all_boxes(video: Path) -> bool:
    """Whether the boxes of an MP4 file end at its end and include the index, which is written last."""
    try:
        boxes, position, end = set(), 0, video.stat().st_size
        with video.open("rb") as file:
            while position < end:
                file.seek(position)
                size, box = int.from_bytes(file.read(4), "big"), file.read(4)
                size = int.from_bytes(file.read(8), "big") if size == 1 else size
                if size < 8:
                    return False
                boxes.add(box)
                position += size
    except FileNotFoundError:
        return False
    return position == end and b"moov" in boxes


def read_video(path: Path) -> tuple[NDArray, float]:
    """Return the frames ``[F, H, W, 3]`` uint8 of a video file and its frames per second.

    Raises:
        ValueError: it is no regular file, or cannot be read.
    """
    check_regular_file(path)
    try:
        frames = imageio.imread(path, plugin="FFMPEG")
        return frames, float(imageio.immeta(path, plugin="FFMPEG").get("fps", 8))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot read a video from {shorten_path(path)}: {reason}") from None


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
