"""ColorVideoVDP of videos, by the package ``cvvdp``."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_sparse.output.files import to_uint8

from .unavailable import import_failure
from .video_arrays import to_pair

DISPLAY = "standard_4k"


def color_video_vdp(video: NDArray, reference: NDArray, fps: float = 8) -> float:
    """Return the quality of a clip in just-objectionable differences (JOD): 10 for identical clips, lower is worse.

    R. Mantiuk et al., "ColorVideoVDP: A visual difference predictor for image, video and display distortions", ACM TOG
    43(4), 2024, arXiv:2401.11485. One JOD less means that 75 percent of observers choose the reference. The clip is
    seen at its own size on a 30-inch 4K display at two display heights (``standard_4k``), on which a clip of 80 x 80
    pixels is about one degree wide. It runs on a GPU if there is one; a CPU needs seconds per frame.

    Raises:
        Unavailable: the package is missing, or cannot be imported.
    """
    clip, dense = (to_uint8(np.broadcast_to(x, (*x.shape[:-1], 3))) for x in to_pair(video, reference))
    jod, _ = _model().predict(clip, dense, dim_order="FHWC", frames_per_second=fps)
    return float(jod)


@lru_cache(maxsize=1)
def _model() -> Any:
    with import_failure("cvvdp"):
        from pycvvdp import cvvdp
    return cvvdp(display_name=DISPLAY, quiet=True)
