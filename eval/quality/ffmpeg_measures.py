"""VMAF and XPSNR of videos, by the ffmpeg program of the package ``imageio-ffmpeg``.

Both clips are passed as raw 8-bit RGB. ffmpeg converts them to 8-bit Y'CbCr 4:4:4 (BT.709, limited range), for which
the measures are defined; apart from that rounding nothing is lost, and no encoder is involved.
"""

from __future__ import annotations

import json
import re
import subprocess
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from dit_sparse.output.files import to_uint8

from .unavailable import Unavailable
from .video_arrays import to_pair

VMAF_MIN_SIDE = 33
TO_YUV = "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,format=yuv444p"
EVEN_HEIGHT = "crop=iw:2*floor(ih/2):0:0"


def vmaf(video: NDArray, reference: NDArray, fps: float = 8) -> tuple[float, list[float]]:
    """Return the VMAF score, the mean over the frames, and the scores of the frames, 0..100; higher is more similar.

    Z. Li et al., "Toward A Practical Perceptual Video Quality Metric", Netflix 2016; model vmaf_v0.6.1 of libvmaf, on
    luma. The model was trained on 1920 x 1080 pixels at three picture heights, and clips are measured at their own
    size: scores of small clips rank methods, but are no opinion scores. Identical clips have 97 to 100, because the
    first frame counts as still.

    Raises:
        Unavailable: the filter is missing, or a side has fewer than 33 pixels: libvmaf crashes at 16 and less, and
            between 17 and 32 it gives identical clips up to 2.3 points less than larger ones.
    """
    if min(video.shape[1:3]) < VMAF_MIN_SIDE:
        raise Unavailable(f"vmaf needs frames of at least {VMAF_MIN_SIDE} x {VMAF_MIN_SIDE} pixels")
    log = json.loads(_run_filter("libvmaf", "libvmaf=log_fmt=json:log_path=log", video, reference, fps))
    frames = [float(frame["metrics"]["vmaf"]) for frame in log["frames"]]
    return float(np.mean(frames)), frames


def xpsnr(video: NDArray, reference: NDArray, fps: float = 8) -> tuple[float, list[float]]:
    """Return the XPSNR of luma in dB over the clip, and that of every frame; inf for identical clips.

    C. Helmrich et al., ITU Journal: ICT Discoveries 3(1), 2020: the squared error is weighted less where contrast and
    motion hide it. Below about 45 x 45 pixels ffmpeg uses no weights, so the value is the PSNR of luma. The last row of
    an odd height is left out, because the weights of ffmpeg are wrong for blocks of one row.

    Raises:
        Unavailable: the filter is missing.
    """
    log = _run_filter("xpsnr", f"{EVEN_HEIGHT},xpsnr=stats_file=log", video, reference, fps)
    frames = [float(value) for value in re.findall(r"^n: *\d+ +XPSNR y: *(\S+)", log, re.MULTILINE)]
    average = re.search(r"^XPSNR average.*? y: *(\S+)", log, re.MULTILINE)
    if average is None or len(frames) != len(video):
        raise Unavailable("ffmpeg wrote no XPSNR for every frame")
    return float(average[1]), frames


def _run_filter(name: str, graph: str, video: NDArray, reference: NDArray, fps: float) -> str:
    """Return what a filter of two videos writes to the file ``log``.

    Args:
        name: name of the filter.
        graph: the filter with its options. A filter before it, as in ``crop=..,xpsnr``, is applied to both videos.
    """
    program = _program(name)
    *before, measure = graph.split(",")
    prepare = ",".join([*before, TO_YUV])
    height, width = video.shape[1:3]
    source = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {fps:g} -i".split()
    with TemporaryDirectory(prefix="dit-sparse-") as folder:
        for file, clip in zip(("video", "reference"), to_pair(video, reference), strict=True):
            Path(folder, file).write_bytes(_rgb(clip).tobytes())
        filters = f"[0:v]{prepare}[a];[1:v]{prepare}[b];[a][b]{measure}"
        command = [program, "-hide_banner", "-nostdin", "-loglevel", "error", *source, "video", *source, "reference"]
        command += ["-lavfi", filters, "-f", "null", "-"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
        log = Path(folder, "log")
        if done.returncode or not log.is_file():
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise Unavailable(f"ffmpeg failed in {name}: {reason[:200]}")
        return log.read_text(encoding="utf-8")


def _rgb(clip: NDArray) -> NDArray:
    if clip.shape[-1] not in (1, 3):
        raise Unavailable(f"the measures of ffmpeg need 1 or 3 channels, got {clip.shape[-1]}")
    return to_uint8(np.broadcast_to(clip, (*clip.shape[:-1], 3)))


@lru_cache
def _program(name: str) -> str:
    """Return the path of an ffmpeg that has a filter."""
    from imageio_ffmpeg import get_ffmpeg_exe

    try:
        program = get_ffmpeg_exe()
        done = subprocess.run([program, "-hide_banner", "-filters"], capture_output=True, text=True, check=True)
    except (RuntimeError, OSError, subprocess.CalledProcessError):
        raise Unavailable("there is no ffmpeg that runs; get one with: pip install -U imageio-ffmpeg") from None
    if not re.search(rf"^ *\S+ +{name} ", done.stdout, re.MULTILINE):
        raise Unavailable(
            f"the ffmpeg that imageio-ffmpeg uses has no filter {name}; get one that has it with: "
            "pip install -U imageio-ffmpeg, and unset IMAGEIO_FFMPEG_EXE"
        )
    return program
