"""Table of the measures of fidelity to a reference video."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from numpy.typing import NDArray

from .color_video_vdp import color_video_vdp
from .ffmpeg_measures import vmaf, xpsnr
from .lpips_distance import lpips_by_frame, shift_tolerant_lpips_by_frame
from .ms_ssim import ms_ssim
from .pixel_measures import per_frame, psnr, ssim

Score = Callable[[NDArray, NDArray, float], tuple[float, list[float] | None]]


@dataclass(frozen=True)
class Measure:
    """A measure of fidelity.

    Attributes:
        title: heading of its column, with the unit.
        score: returns the value of a clip and those of its frames, None for a measure that has no values of frames.
            Arguments: video and reference ``[F, H, W, C]``, uint8 or floats in [0, 1], and frames per second.
        digits: decimal places in tables.
        explanation: a phrase for lists of columns.
        larger_is_better: False for distances.
        slow: a CPU needs seconds per frame; `dit-sparse compare` computes it only on request.
    """

    title: str
    score: Score
    digits: int
    explanation: str
    larger_is_better: bool = True
    slow: bool = False


def _mean_of_frames(by_frame: Callable[[NDArray, NDArray], list[float]]) -> Score:
    def score(video: NDArray, reference: NDArray, fps: float) -> tuple[float, list[float]]:
        frames = by_frame(video, reference)
        return sum(frames) / len(frames), frames

    return score


MEASURES = {
    "psnr": Measure(
        "PSNR (dB)",
        lambda video, reference, fps: (psnr(video, reference), per_frame(psnr, video, reference)),
        1,
        "to the dense video of the same prompt and seed",
    ),
    "ssim": Measure(
        "SSIM",
        _mean_of_frames(lambda video, reference: per_frame(ssim, video, reference)),
        3,
        "structural similarity to the dense video",
    ),
    "ms_ssim": Measure(
        "MS-SSIM",
        _mean_of_frames(lambda video, reference: per_frame(ms_ssim, video, reference)),
        3,
        "the same at several scales",
    ),
    "xpsnr": Measure("XPSNR (dB)", xpsnr, 1, "PSNR of luma, weighted by how visible an error is"),
    "vmaf": Measure("VMAF", vmaf, 1, "0 to 100; trained on large pictures, so only to compare clips of one size"),
    "lpips": Measure(
        "LPIPS", _mean_of_frames(lpips_by_frame), 3, "perceptual distance to the dense video; lower is better", False
    ),
    "st_lpips": Measure(
        "ST-LPIPS",
        _mean_of_frames(shift_tolerant_lpips_by_frame),
        3,
        "LPIPS that tolerates small shifts; lower is better",
        False,
        slow=True,
    ),
    "cvvdp": Measure(
        "CVVDP (JOD)",
        lambda video, reference, fps: (color_video_vdp(video, reference, fps), None),
        2,
        "ColorVideoVDP; 10 for identical clips, one less is noticed by 75 percent",
        slow=True,
    ),
}
REQUIRED = ("psnr", "ssim")  # of every comparison
FAST = tuple(name for name, measure in MEASURES.items() if not measure.slow)


def select_measures(names: Sequence[str]) -> tuple[str, ...]:
    """Return the named measures and the required ones, in the order of `MEASURES`; ``all`` stands for every measure.

    Raises:
        ValueError: a name is unknown.
    """
    if unknown := next((name for name in names if name not in (*MEASURES, "all")), None):
        raise ValueError(f"there is no measure {unknown[:60]!r}; there are {', '.join(MEASURES)}, or all")
    return tuple(name for name in MEASURES if name in (*names, *REQUIRED) or "all" in names)
