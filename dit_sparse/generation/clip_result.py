"""The JSON file next to a video, for single clips and batches."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from ..output.environment import conditions
from .generate import Clip


def clip_result(asked: dict, clip: Clip, report: dict, video: Path) -> dict:
    """Return the content of the JSON file of a finished clip: its settings, the denoising time in seconds, the report
    of the run, the digest of the video, device, versions and commit.

    Args:
        asked: all settings that determine the clip, as plain values.
        clip: the clip.
        report: the report of the run, as plain values.
        video: the file, which is written.
    """
    result = {"status": "done", "seconds": clip.seconds, "report": report, "asked": asked}
    return result | {"video_sha256": sha256(video.read_bytes()).hexdigest()} | conditions()
