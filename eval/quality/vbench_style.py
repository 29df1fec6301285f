"""How good a video is by itself, in dimensions of VBench: functions on ``[F, H, W, C]``, uint8 or floats in 0..1.

Source: Z. Huang et al., "VBench: Comprehensive Benchmark Suite for Video Generative Models", CVPR 2024,
arXiv:2311.17982, sec. 3.2, and the settings of the tool its authors released (package ``vbench``).

Differs from the authors' tool, besides what each function says: it scores the frames as they are, not an encoded file;
one clip at a time, where the tool averages over its prompts; frames are not rounded to bytes in between. So the numbers
compare the clips of one study with each other, not with VBench's leaderboard; ``vbench_files.export`` writes clips for
the tool itself. Learned dimensions need weights on this machine (``learned``) and are never guessed without.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from . import learned
from .fidelity import Unavailable, shown, unit_range

FLOW_SIDE = 256  # frames are reduced to this shorter side for optical flow
LEAST_SIDE = 8


def quality(video: NDArray, prompt: str | None = None, fps: float = 8) -> dict[str, float | dict[str, str]]:
    """Every dimension of ``dimensions()``: a number, or ``{"unavailable": why}`` with what is missing.

    Args:
        video: ``[F, H, W, C]``, uint8 or floats in 0..1.
        prompt: what the video was asked to show, for the dimensions that read it.
        fps: frames a second, which the dynamic degree is measured against.

    Raises:
        ValueError: the array is no video.
    """
    video = unit_range(video)
    moved = cache(lambda: motion(video, fps))
    calls: dict[str, Callable[[], float]] = {
        "temporal_flickering": lambda: temporal_flickering(video),
        "motion_smoothness": lambda: motion_smoothness(video),
        "dynamic_degree": lambda: moved()[0],
        "flow_magnitude": lambda: moved()[1],
        "imaging_quality": lambda: imaging_quality(video),
        "aesthetic_quality": lambda: aesthetic_quality(video),
        "subject_consistency": lambda: subject_consistency(video),
        "background_consistency": lambda: background_consistency(video),
        "overall_consistency": lambda: overall_consistency(video, prompt),
        "clip_text_consistency": lambda: clip_text_consistency(video, prompt),
    }
    return {name: _or_why_not(call) for name, call in calls.items()}


def dimensions() -> dict[str, str]:
    """What ``quality`` measures, each in a sentence."""
    return {measure.__name__: " ".join((measure.__doc__ or "").split("\n\n")[0].split()) for measure in _MEASURES}


def temporal_flickering(video: NDArray) -> float:
    """(255 - MAE) / 255 with the mean absolute difference of consecutive frames, in 0..1; larger is calmer.

    The tool's formula; but the tool first leaves out videos that move, for motion counts as flicker here.
    """
    video = _with_frames(video, 2)
    return 1 - float(np.mean([np.abs(b - a).mean() for a, b in pairwise(video)]))


def motion_smoothness(video: NDArray) -> float:
    """(255 - MAE) / 255 between every odd frame and what lies midway between its neighbours, in 0..1.

    The tool interpolates with the network AMT-S. Here the midway frame is the mean of both neighbours, moved by half
    their optical flow (TV-L1, C. Zach et al., DAGM 2007, by scikit-image), which itself is moved to the middle. It
    blurs what is uncovered, and loses fast motion: a disc with a steady course over 80 x 80 has 1.0000 at 4 px a frame,
    0.999 at 8 and 0.97 at 12, where plain blending has 0.986, 0.968 and 0.952.
    """
    video = _with_frames(video, 3)
    trios = zip(video[:-2:2], video[1:-1:2], video[2::2], strict=True)
    return 1 - float(np.mean([np.abs(_midway(before, after) - frame).mean() for before, frame, after in trios]))


def dynamic_degree(video: NDArray, fps: float = 8) -> float:
    """1 if the clip moves, else 0: of N frames at about 8 a second, at least round(N / 4) steps, and at least one,
    whose largest 5 percent of flow have a mean over 6 px per 256 px of the frame's shorter side.

    The tool takes the flow from RAFT, here it is TV-L1 on grey frames of at most 256 px; and it calls a clip of one
    or two frames dynamic without any motion. TV-L1 was seen right up to a fifth of the frame a step.
    """
    return motion(video, fps)[0]


def flow_magnitude(video: NDArray, fps: float = 8) -> float:
    """What ``dynamic_degree`` compares: the mean over a step's fastest 5 percent of pixels, in px of the frame per
    1/8 second, averaged over the steps.

    No dimension of VBench: its yes or no hides how much less a sparse video moves.
    """
    return motion(video, fps)[1]


def imaging_quality(video: NDArray) -> float:
    """Technical quality, 0..1: the mean over the frames of MUSIQ (trained on SPAQ) / 100, as in the tool.

    Raises:
        Unavailable: the package ``pyiqa`` or the weights are not on this machine.
    """
    return float(np.mean(learned.musiq(unit_range(video)))) / 100


def aesthetic_quality(video: NDArray) -> float:
    """Beauty, about 0..1: the mean over the frames of LAION's aesthetic predictor on CLIP ViT-L/14, / 10.

    As in the tool; CLIP comes from transformers, in float32.
    """
    features = learned.clip_image(unit_range(video), learned.CLIP_LARGE)
    return float(learned.aesthetic_rating(F.normalize(features, dim=-1)).mean()) / 10


def subject_consistency(video: NDArray) -> float:
    """Whether the subject stays itself, 0..1: ``consistency`` of DINO ViT-B/16 features.

    As in the tool, but that DINO comes from transformers, which resamples its positions a little differently where
    frames are not square.
    """
    return consistency(learned.dino(_with_frames(video, 2)))


def background_consistency(video: NDArray) -> float:
    """Whether the scene stays itself, 0..1: ``consistency`` of CLIP ViT-B/32 image features.

    As in the tool; CLIP comes from transformers, in float32.
    """
    return consistency(learned.clip_image(_with_frames(video, 2), learned.CLIP_BASE))


def overall_consistency(video: NDArray, prompt: str | None) -> float:
    """Whether video and prompt agree, by the video-text model ViCLIP of the tool; never available here.

    ViCLIP is code and weights of the tool's own, and a number by another model must not bear its name.
    """
    raise Unavailable(
        f"ViCLIP runs only in VBench's own tool, with the weights {shown(learned.vbench_cache() / 'ViCLIP')}/"
        "ViClip-InternVid-10M-FLT.pth, which it downloads: write the clips with vbench_files.export, then "
        "pip install vbench; vbench evaluate --dimension overall_consistency"
    )


def clip_text_consistency(video: NDArray, prompt: str | None) -> float:
    """The cosine of prompt and frame by CLIP ViT-B/32, the mean over the frames, in -1..1; 0.3 is a good match.

    No dimension of VBench. It sees no motion.
    """
    if not prompt:
        raise Unavailable("it needs the prompt")
    frames = learned.clip_image(unit_range(video), learned.CLIP_BASE)
    return float(F.cosine_similarity(frames, learned.clip_text(prompt, learned.CLIP_BASE)).mean())


def consistency(features: Tensor) -> float:
    """Of features ``[F, D]``: the mean over the frames but the first of (cos(first, frame) + cos(previous, frame)) / 2,
    cosines below 0 counted as 0."""
    unit = F.normalize(features.float(), dim=-1)
    first, previous = unit[1:] @ unit[0], (unit[1:] * unit[:-1]).sum(-1)
    return float((first.clamp(min=0) + previous.clamp(min=0)).mean() / 2)


def motion(video: NDArray, fps: float = 8) -> tuple[float, float]:
    """``dynamic_degree`` and ``flow_magnitude`` from one pass over the flow."""
    video = _with_frames(unit_range(video)[:: max(1, round(fps / 8))], 2)
    grey = [_grey(frame) for frame in video]
    fastest = [_mean_of_largest(np.hypot(*_flow(a, b))) for a, b in pairwise(grey)]
    threshold = 6 * min(video.shape[1:3]) / 256
    moving = sum(speed > threshold for speed in fastest)
    return float(moving >= max(1, round(len(video) / 4))), float(np.mean(fastest))


_MEASURES = (
    temporal_flickering,
    motion_smoothness,
    dynamic_degree,
    flow_magnitude,
    imaging_quality,
    aesthetic_quality,
    subject_consistency,
    background_consistency,
    overall_consistency,
    clip_text_consistency,
)


def _or_why_not(call: Callable[[], float]) -> float | dict[str, str]:
    try:
        return call()
    except Unavailable as missing:
        return {"unavailable": str(missing)}


def _with_frames(video: NDArray, least: int) -> NDArray:
    video = unit_range(video)
    if len(video) < least:
        raise Unavailable(f"it needs at least {least} frames, and there are {len(video)}")
    return video


def _mean_of_largest(speed: NDArray) -> float:
    count = max(1, int(0.05 * speed.size))
    return float(np.partition(speed.ravel(), -count)[-count:].mean())


def _grey(frame: NDArray) -> NDArray:
    return frame @ (0.299, 0.587, 0.114) if frame.shape[-1] == 3 else frame.mean(-1)


def _flow(a: NDArray, b: NDArray) -> NDArray:
    """Where the pixels of ``a`` are in ``b``: ``[2, H, W]`` rows and columns, in px. TV-L1 and not the faster iterative
    Lucas-Kanade, which sees motion in the noise of flat areas."""
    from skimage.registration import optical_flow_tvl1
    from skimage.transform import resize

    if min(a.shape) < LEAST_SIDE:
        raise Unavailable(f"optical flow needs frames of at least {LEAST_SIDE} x {LEAST_SIDE} pixels")
    ratio = FLOW_SIDE / min(a.shape)
    if ratio >= 1:
        return optical_flow_tvl1(a, b, dtype=np.float32)
    size = tuple(round(side * ratio) for side in a.shape)
    small = optical_flow_tvl1(*(resize(x, size, anti_aliasing=True) for x in (a, b)), dtype=np.float32)
    scale = np.array(a.shape) / size
    return np.stack([resize(part, a.shape) * factor for part, factor in zip(small, scale, strict=True)])


def _midway(before: NDArray, after: NDArray) -> NDArray:
    """The frame between two, ``[H, W, C]``."""
    half = _flow(_grey(before), _grey(after)) / 2
    half = _moved(half.transpose(1, 2, 0), -half).transpose(2, 0, 1)
    return (_moved(before, -half) + _moved(after, half)) / 2


def _moved(image: NDArray, flow: NDArray) -> NDArray:
    """``image [H, W, C]`` read at every pixel plus ``flow [2, H, W]``, by cubic splines; borders are repeated."""
    from skimage.transform import warp

    places = np.indices(image.shape[:2]) + flow
    channels = [warp(image[..., c], places, order=3, mode="edge") for c in range(image.shape[-1])]
    return np.stack(channels, -1)
