"""VMAF and XPSNR by ffmpeg, ColorVideoVDP and ST-LPIPS: laws, sizes, and what is said when one is missing."""

import importlib
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

from attention_cases import skip_or_fail
from dit_sparse.eval.quality import color_video_vdp, ffmpeg_measures, lpips_distance
from dit_sparse.eval.quality.fidelity import fidelity
from dit_sparse.eval.quality.measures import FAST, MEASURES, select_measures
from dit_sparse.eval.quality.unavailable import Unavailable

PACKAGES = Path(sys.prefix, "packages")


def smooth(height: int = 64, width: int = 64, frames: int = 3) -> np.ndarray:
    """Return a clip of moving blobs, uint8 ``[F, H, W, 3]``."""
    noise = np.random.default_rng(height).random((1, height, width, 3))
    still = ndimage.gaussian_filter(noise, (0, 4, 4, 0), mode="wrap")
    still = (still - still.min()) / np.ptp(still)
    return (np.concatenate([np.roll(still, i, 2) for i in range(frames)]) * 255).astype(np.uint8)


def disturb(clip: np.ndarray, amount: int) -> np.ndarray:
    """Return the clip with uniform noise of at most ``amount`` levels."""
    noise = np.random.default_rng(7).integers(-amount, amount + 1, clip.shape)
    return np.clip(clip.astype(int) + noise, 0, 255).astype(np.uint8)


def luma(clip: np.ndarray) -> np.ndarray:
    """Return the luma codes of BT.709 in limited range, 16..235."""
    return (16 + 219 * (clip @ [0.2126, 0.7152, 0.0722]) / 255).round()


@pytest.mark.parametrize("measure", [ffmpeg_measures.vmaf, ffmpeg_measures.xpsnr])
def test_more_noise_scores_lower(measure):
    clip = smooth()
    scores = [measure(disturb(clip, amount), clip)[0] for amount in (0, 4, 16, 64)]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 4


def test_identical_clips():
    clip = smooth()
    score, frames = ffmpeg_measures.vmaf(clip, clip)
    assert len(frames) == 3 and 97 < score <= 100 and score == pytest.approx(np.mean(frames))
    assert ffmpeg_measures.xpsnr(clip, clip) == (math.inf, [math.inf] * 3)


def test_xpsnr_of_small_frames_is_the_psnr_of_luma():
    """The path to ffmpeg loses nothing: a closed form in numpy, whose conversion differs by rounding only."""
    clip = smooth(40, 40)
    other = disturb(clip, 30)
    expected = [10 * np.log10(255**2 / np.mean((luma(a) - luma(b)) ** 2)) for a, b in zip(clip, other, strict=True)]
    assert ffmpeg_measures.xpsnr(other, clip)[1] == pytest.approx(expected, abs=0.02)


def test_the_last_row_of_an_odd_height_does_not_spoil_xpsnr():
    clip = smooth(65, 64)
    even = ffmpeg_measures.xpsnr(disturb(clip, 20)[:, :64], clip[:, :64])[0]
    assert ffmpeg_measures.xpsnr(disturb(clip, 20), clip)[0] == pytest.approx(even, abs=1e-3)


def test_floats_and_bytes_and_grey_frames_score_the_same():
    clip, other = smooth(), disturb(smooth(), 20)
    assert ffmpeg_measures.vmaf(other / 255, clip / 255) == ffmpeg_measures.vmaf(other, clip)
    grey, other_grey = clip[..., :1], other[..., :1]
    assert ffmpeg_measures.vmaf(other_grey, grey) == ffmpeg_measures.vmaf(
        *(x.repeat(3, -1) for x in (other_grey, grey))
    )
    with pytest.raises(Unavailable, match="1 or 3 channels, got 2"):
        ffmpeg_measures.xpsnr(clip[..., :2], clip[..., :2])


def test_vmaf_of_small_frames_is_unavailable():
    clip = smooth(32, 64)
    with pytest.raises(Unavailable, match="at least 33 x 33 pixels"):
        ffmpeg_measures.vmaf(clip, clip)
    scores = fidelity(clip, clip)
    assert scores["vmaf"] == {"unavailable": "vmaf needs frames of at least 33 x 33 pixels"}
    assert scores["xpsnr"]["pooled"] == "inf"


@pytest.fixture
def other_ffmpeg(monkeypatch):
    """Return a function that makes imageio-ffmpeg use a program of this text."""
    ffmpeg_measures._program.cache_clear()
    yield lambda path: monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))
    ffmpeg_measures._program.cache_clear()


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_without_the_filter_the_reason_says_what_to_install(other_ffmpeg, tmp_path):
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\necho ' TS psnr  VV->V  Calculate the PSNR'\n")
    program.chmod(0o755)
    other_ffmpeg(program)
    clip = smooth()
    for name, scores in fidelity(clip, clip, measures=("vmaf", "xpsnr")).items():
        name = {"vmaf": "libvmaf"}.get(name, name)
        assert f"no filter {name}; get one that has it with: pip install -U imageio-ffmpeg" in scores["unavailable"]


def test_without_ffmpeg_the_reason_says_what_to_install(other_ffmpeg, tmp_path):
    other_ffmpeg(tmp_path / "missing")
    with pytest.raises(Unavailable, match="no ffmpeg that runs; get one with: pip install -U imageio-ffmpeg"):
        ffmpeg_measures.vmaf(smooth(), smooth())


def test_a_crash_of_ffmpeg_is_a_reason(monkeypatch):
    crashed = subprocess.CompletedProcess([], -11, "", "")
    ffmpeg_measures._program("xpsnr")
    monkeypatch.setattr(ffmpeg_measures.subprocess, "run", lambda *args, **settings: crashed)
    scores = fidelity(smooth(), smooth(), measures=("xpsnr",))
    assert scores == {"xpsnr": {"unavailable": "ffmpeg failed in xpsnr: exit code -11"}}


@pytest.mark.parametrize(
    ("model", "package"),
    [(color_video_vdp._model, "pycvvdp"), (lpips_distance._shift_tolerant_model, "stlpips_pytorch")],
)
def test_without_its_package_a_measure_is_absent_with_the_reason(model, package, monkeypatch):
    model.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    name = {"pycvvdp": "cvvdp"}.get(package, "st_lpips")
    (scores,) = fidelity(smooth(), smooth(), measures=(name,)).values()
    assert scores.keys() == {"unavailable"}
    assert "is not installed; get it with: pip install -e '.[metrics]'" in scores["unavailable"]


def test_names_of_measures():
    assert select_measures(["vmaf"]) == ("psnr", "ssim", "vmaf")
    assert select_measures(["all"]) == tuple(MEASURES) and select_measures(FAST) == FAST
    with pytest.raises(ValueError, match="no measure 'vmav'; there are psnr, ssim"):
        select_measures(["vmav"])


# --- the packages, with small replacements for what they import besides torch


class _GaussianBlur(nn.Module):
    """torchvision's transform of this name, with its kernel and reflected edges."""

    def __init__(self, kernel_size: int, sigma: float):
        super().__init__()
        taps = torch.exp(-0.5 * (torch.arange(kernel_size) - kernel_size // 2).div(sigma) ** 2)
        self.taps = taps / taps.sum()

    def forward(self, x):
        size, taps = len(self.taps), self.taps.to(x)
        flat = F.pad(x.reshape(-1, 1, *x.shape[-2:]), [size // 2] * 4, mode="reflect")
        return F.conv2d(F.conv2d(flat, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1)).view(x.shape)


REPLACEMENTS = {
    "torchvision": {"models": None},
    "torchvision.transforms": {"GaussianBlur": _GaussianBlur},
    "torchvision.ops": {"MLP": None},
    "torchsummary": {"summary": None},
    "IPython": {"embed": None},
    "ffmpeg": {},
    "einops": {"rearrange": None, "repeat": None},
    "einops.layers": {},
    "einops.layers.torch": {"Rearrange": None},
}


@pytest.fixture(scope="module")
def packages():
    """cvvdp and stlpips-pytorch of .venv/packages, without torchvision and the other packages that they import."""
    folders = [PACKAGES / name for name in ("cvvdp-0.5.7", "stlpips_pytorch-0.0.2")]
    if missing := next((folder.name for folder in folders if not folder.is_dir()), None):
        skip_or_fail(f"requires a package in .venv/packages: run make .venv/packages/{missing}")
    before, path = dict(sys.modules), list(sys.path)
    for name, content in REPLACEMENTS.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        sys.modules[name] = module
    sys.path += map(str, folders)
    for model in (color_video_vdp._model, lpips_distance._shift_tolerant_model):
        model.cache_clear()
    importlib.invalidate_caches()
    yield
    sys.path[:] = path
    for name in sys.modules.keys() - before.keys():
        del sys.modules[name]
    sys.modules.update(before)
    for model in (color_video_vdp._model, lpips_distance._shift_tolerant_model):
        model.cache_clear()


def test_color_video_vdp(packages):
    clip = smooth(24, 24, 2)
    scores = [fidelity(disturb(clip, amount), clip, 8, ("cvvdp",))["cvvdp"] for amount in (0, 16, 64)]
    jods = [score["pooled"] for score in scores]
    assert jods[0] == pytest.approx(10, abs=1e-3) and jods == sorted(jods, reverse=True) and jods[2] < 9
    assert scores[0].keys() == {"pooled"}


def test_shift_tolerant_lpips(packages):
    clip = smooth(24, 24, 1)
    distance = lambda other: fidelity(other, clip, measures=("st_lpips",))["st_lpips"]["pooled"]
    assert distance(clip) == 0
    assert 0 < distance(disturb(clip, 8)) < distance(disturb(clip, 64))
    assert distance(np.roll(clip, 1, 2)) < 0.2 * distance(clip[:, :, ::-1])
    with pytest.raises(Unavailable, match="at least 21 x 21 pixels"):
        lpips_distance.shift_tolerant_lpips_by_frame(clip[:, :20], clip[:, :20])
