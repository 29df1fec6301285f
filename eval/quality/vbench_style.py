"""Quality of a single video in dimensions of VBench: functions on ``[F, H, W, C]``, uint8 or floats in [0, 1].

Source: Z. Huang et al., "VBench: Comprehensive Benchmark Suite for Video Generative Models", CVPR 2024,
arXiv:2311.17982, sec. 3.2, and the settings of the tool its authors released (package ``vbench``).

Differs from the authors' tool, apart from what each function states: it scores the frames as they are, not an encoded
file; one clip at a time, where the tool averages over its prompts; frames are not rounded to bytes in between. The
scores compare clips of one study with each other, not with VBench's leaderboard; `vbench_export` writes clips for the
tool. Dimensions of pretrained models need weights on this machine (`learned_features`) and are unavailable otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from . import learned_features as features
from .optical_flow import grey, interpolate_midway, optical_flow
from .unavailable import Unavailable, display_path
from .video_arrays import to_unit_range

FLOW_THRESHOLD = 6 / 256  # a moving step, in parts of the frame's shorter side


def quality(video: NDArray, prompt: str | None = None, fps: float = 8) -> dict[str, float | dict[str, str]]:
    """Return the score of every dimension, or ``{"unavailable": reason}``.

    Args:
        video: ``[F, H, W, C]``, uint8 or floats in [0, 1].
        prompt: the prompt of the video, for the dimensions that use it.
        fps: frame rate in frames per second, for the dimensions of motion.

    Raises:
        ValueError: the array is no video.
    """
    video = to_unit_range(video)
    motion_scores = cache(lambda: motion(video, fps))
    scores: dict[str, Callable[[], float]] = {
        "temporal_flickering": lambda: temporal_flickering(video),
        "motion_smoothness": lambda: motion_smoothness(video),
        "dynamic_degree": lambda: motion_scores()[0],
        "flow_magnitude": lambda: motion_scores()[1],
        "imaging_quality": lambda: imaging_quality(video),
        "aesthetic_quality": lambda: aesthetic_quality(video),
        "subject_consistency": lambda: subject_consistency(video),
        "background_consistency": lambda: background_consistency(video),
        "overall_consistency": lambda: overall_consistency(video, prompt),
        "clip_text_consistency": lambda: clip_text_consistency(video, prompt),
    }
    return {name: _score_or_reason(score) for name, score in scores.items()}


def dimensions() -> dict[str, str]:
    """Return the dimensions of ``quality``, each with a one-sentence description."""
    return {score.__name__: " ".join((score.__doc__ or "").split("\n\n")[0].split()) for score in _DIMENSIONS}


def temporal_flickering(video: NDArray) -> float:
    """Return (255 - MAE) / 255 of the mean absolute error of consecutive frames, in [0, 1]; higher flickers less.

    As in the tool, which first filters out videos that move, because motion counts as flicker here.
    """
    video = _require_frames(video, 2)
    return 1 - float(np.mean([np.abs(b - a).mean() for a, b in pairwise(video)]))


def motion_smoothness(video: NDArray) -> float:
    """Return (255 - MAE) / 255 between every odd frame and the interpolation of its neighbours, in [0, 1].

    The tool interpolates with the network AMT-S. Here the interpolated frame is the mean of both neighbours, warped by
    half their optical flow (TV-L1, C. Zach et al., DAGM 2007, by scikit-image), which itself is warped to the middle.
    It blurs uncovered areas and loses fast motion: a disc in uniform motion over 80 x 80 pixels scores 1.0000 at 4 px a
    frame, 0.999 at 8 and 0.97 at 12, where plain blending scores 0.986, 0.968 and 0.952.
    """
    video = _require_frames(video, 3)
    triples = zip(video[:-2:2], video[1:-1:2], video[2::2], strict=True)
    errors = [np.abs(interpolate_midway(before, after) - frame).mean() for before, frame, after in triples]
    return 1 - float(np.mean(errors))


def dynamic_degree(video: NDArray, fps: float = 8) -> float:
    """Return 1 if the clip moves, else 0: of N frames at about 8 fps, at least round(N / 4) steps (and at least one)
    have a mean of the largest 5 percent of flow above 6 px per 256 px of the frame's shorter side.

    The tool computes the flow with RAFT; here it is TV-L1 on grey frames of at most 256 px, which was correct for
    motion of up to a fifth of the frame per step. The tool also calls clips of one or two frames dynamic.
    """
    return motion(video, fps)[0]


def flow_magnitude(video: NDArray, fps: float = 8) -> float:
    """Return the mean flow of the fastest 5 percent of pixels, in px per 1/8 second, averaged over the steps.

    Not a dimension of VBench: ``dynamic_degree`` thresholds this value, which hides how much less a sparse video moves.
    """
    return motion(video, fps)[1]


def imaging_quality(video: NDArray) -> float:
    """Return the technical quality in [0, 1]: the mean of MUSIQ (trained on SPAQ) over the frames, / 100.

    As in the tool.

    Raises:
        Unavailable: the package ``pyiqa`` or the weights are missing.
    """
    return float(np.mean(features.musiq_scores(to_unit_range(video)))) / 100


def aesthetic_quality(video: NDArray) -> float:
    """Return the aesthetic quality, about 0..1: the mean of LAION's aesthetic predictor on CLIP ViT-L/14, / 10.

    As in the tool; CLIP comes from transformers, in float32.
    """
    embeddings = features.clip_image_features(to_unit_range(video), features.CLIP_LARGE)
    return float(features.aesthetic_scores(F.normalize(embeddings, dim=-1)).mean()) / 10


def subject_consistency(video: NDArray) -> float:
    """Return how consistent the subject is over time, in [0, 1]: ``consistency`` of DINO ViT-B/16 features.

    As in the tool, except that DINO comes from transformers, which resamples its position embeddings slightly
    differently for frames that are not square.
    """
    return consistency(features.dino_features(_require_frames(video, 2)))


def background_consistency(video: NDArray) -> float:
    """Return how consistent the scene is over time, in [0, 1]: ``consistency`` of CLIP ViT-B/32 image features.

    As in the tool; CLIP comes from transformers, in float32.
    """
    return consistency(features.clip_image_features(_require_frames(video, 2), features.CLIP_BASE))


def overall_consistency(video: NDArray, prompt: str | None) -> float:
    """Return how well video and prompt agree according to the tool's ViCLIP; always unavailable here.

    ViCLIP's code and weights are part of the tool, and the score of another model must not have the same name.
    """
    weights = display_path(features.vbench_cache() / "ViCLIP")
    raise Unavailable(
        f"ViCLIP runs only in VBench's own tool, with the weights {weights}/ViClip-InternVid-10M-FLT.pth, which it "
        "downloads: write the clips with dit-sparse eval export, then pip install vbench; "
        "vbench evaluate --dimension overall_consistency"
    )


def clip_text_consistency(video: NDArray, prompt: str | None) -> float:
    """Return the mean cosine of prompt and frames by CLIP ViT-B/32, in [-1, 1]; 0.3 is a good match.

    Not a dimension of VBench. It ignores motion.
    """
    if not prompt:
        raise Unavailable("it needs the prompt")
    frames = features.clip_image_features(to_unit_range(video), features.CLIP_BASE)
    text = features.clip_text_features(prompt, features.CLIP_BASE)
    return float(F.cosine_similarity(frames, text).mean())


def consistency(embeddings: Tensor) -> float:
    """Return the consistency of embeddings ``[F, D]`` over time.

    The mean over all frames but the first of (cos(first, frame) + cos(previous, frame)) / 2, where negative cosines
    count as 0.
    """
    unit = F.normalize(embeddings.float(), dim=-1)
    first, previous = unit[1:] @ unit[0], (unit[1:] * unit[:-1]).sum(-1)
    return float((first.clamp(min=0) + previous.clamp(min=0)).mean() / 2)


def motion(video: NDArray, fps: float = 8) -> tuple[float, float]:
    """Return ``dynamic_degree`` and ``flow_magnitude`` from one computation of the flow."""
    video = _require_frames(to_unit_range(video)[:: max(1, round(fps / 8))], 2)
    frames = [grey(frame) for frame in video]
    speeds = [_mean_of_largest(np.hypot(*optical_flow(a, b))) for a, b in pairwise(frames)]
    moving = sum(speed > FLOW_THRESHOLD * min(video.shape[1:3]) for speed in speeds)
    return float(moving >= max(1, round(len(video) / 4))), float(np.mean(speeds))


_DIMENSIONS = (
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


def _score_or_reason(score: Callable[[], float]) -> float | dict[str, str]:
    try:
        return score()
    except Unavailable as error:
        return {"unavailable": str(error)}


def _require_frames(video: NDArray, count: int) -> NDArray:
    video = to_unit_range(video)
    if len(video) < count:
        raise Unavailable(f"it needs at least {count} frames, got {len(video)}")
    return video


def _mean_of_largest(speed: NDArray) -> float:
    """Return the mean of the largest 5 percent of values."""
    count = max(1, int(0.05 * speed.size))
    return float(np.partition(speed.ravel(), -count)[-count:].mean())
