"""Fidelity metrics against closed forms and independent implementations."""

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.metrics import structural_similarity

from dit_sparse.eval.quality import fidelity as metrics
from dit_sparse.eval.quality import lpips_distance
from dit_sparse.eval.quality.measures import MEASURES
from dit_sparse.eval.quality.ms_ssim import scale_count
from dit_sparse.eval.quality.unavailable import Unavailable, display_path
from dit_sparse.eval.quality.video_arrays import to_unit_range


def clip(seed: int, frames: int = 3, height: int = 20, width: int = 27) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def pair(height: int, width: int, frames: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Return a smooth clip and the same with noise, so that no scale is saturated."""
    generator = np.random.default_rng(height * width)
    smooth = ndimage.gaussian_filter(generator.random((frames, height, width, 3)), (0, 2, 2, 0))
    reference = (smooth - smooth.min()) / np.ptp(smooth)
    return np.clip(reference * 0.9 + 0.1 * generator.random(reference.shape), 0, 1), reference


def plain_ms_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Return the MS-SSIM of one channel of one frame, with scipy, written from the paper."""
    weights = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]
    side, count = min(x.shape), 1
    while count < 5 and math.ceil(side / 2) >= 11:
        side, count = math.ceil(side / 2), count + 1
    radius = (min(11, min(x.shape)) - 1) // 2
    value = 1.0
    for scale in range(count):
        if scale:
            x, y = (block_means(image) for image in (x, y))

        def blurred(image):
            full = ndimage.gaussian_filter(image, 1.5, radius=radius)
            return full[radius : image.shape[0] - radius, radius : image.shape[1] - radius]

        mx, my = blurred(x), blurred(y)
        vx, vy, vxy = blurred(x * x) - mx * mx, blurred(y * y) - my * my, blurred(x * y) - mx * my
        part = (2 * vxy + 0.0009) / (vx + vy + 0.0009)
        if scale == count - 1:
            part = part * (2 * mx * my + 0.0001) / (mx * mx + my * my + 0.0001)
        value *= max(part.mean(), 0) ** (weights[scale] / sum(weights[:count]))
    return value


def block_means(image: np.ndarray) -> np.ndarray:
    rows, columns = image.shape
    padded = np.pad(image, ((0, rows % 2), (0, columns % 2)), mode="edge")
    return (padded[::2, ::2] + padded[1::2, ::2] + padded[::2, 1::2] + padded[1::2, 1::2]) / 4


@pytest.mark.parametrize("size", [(176, 180), (97, 133), (80, 80), (33, 47), (21, 22), (8, 9)], ids=str)
def test_ms_ssim_agrees_with_an_independent_implementation(size):
    video, reference = pair(*size)
    expected = [
        plain_ms_ssim(a[..., c], b[..., c]) for a, b in zip(video, reference, strict=True) for c in range(a.shape[-1])
    ]
    assert metrics.ms_ssim(video, reference) == pytest.approx(np.mean(expected), abs=1e-12)


def test_scale_count_is_limited_by_the_window():
    sizes = {(480, 832): 5, (161, 161): 5, (160, 999): 4, (96, 96): 4, (80, 80): 3, (21, 40): 2, (20, 27): 1, (3, 2): 1}
    assert {size: scale_count(*size) for size in sizes} == sizes


def test_ms_ssim_with_one_scale_is_gaussian_ssim():
    video, reference = pair(20, 13)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = [
        structural_similarity(a, b, channel_axis=-1, data_range=1.0, **settings)
        for a, b in zip(video, reference, strict=True)
    ]
    assert metrics.ms_ssim(video, reference) == pytest.approx(np.mean(expected), abs=1e-12)


def test_ms_ssim_is_in_the_unit_range():
    a = clip(0, 1, 64, 64)
    assert metrics.ms_ssim(a, a) == pytest.approx(1)
    assert metrics.ms_ssim(a, 255 - a) == 0
    assert metrics.ms_ssim(clip(0, 1, 3, 2), clip(0, 1, 3, 2)) == pytest.approx(1)


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim, metrics.ms_ssim])
def test_bytes_and_floats_give_the_same_value(metric):
    a, b = clip(0), clip(1)
    assert metric(a / 255.0, (b / 255).astype(np.float32)) == pytest.approx(metric(a, b), rel=1e-5)


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim, metrics.ms_ssim, metrics.lpips, metrics.fidelity])
def test_different_shapes_raise(metric):
    for a, b in [(clip(0), clip(0, frames=4)), (clip(0), clip(0, height=21)), (clip(0)[0], clip(0)[0])]:
        with pytest.raises(ValueError, match="the same shape"):
            metric(a, b)
    with pytest.raises(ValueError, match="the same shape"):
        metrics.per_frame(metrics.ssim, clip(0), clip(0, frames=4))


def test_arrays_that_are_no_videos_raise():
    broken = clip(0) / 255
    broken[1, 2, 3] = np.nan
    with pytest.raises(ValueError, match="must hold finite numbers"):
        metrics.fidelity(broken, clip(1))
    with pytest.raises(ValueError, match="a video must be"):
        metrics.psnr(clip(0)[:0], clip(0)[:0])
    with pytest.raises(ValueError, match="at least 3 x 3"):
        metrics.ssim(clip(0, 1, 2, 9), clip(1, 1, 2, 9))


@pytest.mark.parametrize(
    "video, message",
    [
        (clip(0).astype(np.int64), "got int64"),
        (clip(0) > 9, "got bool"),
        (clip(0).astype(np.float32), "divide bytes by 255"),
        (clip(0) / 127.5 - 1, "must be in .0, 1., got -1 to 1"),
        (clip(0) / 255 + 2e-3, "must be in .0, 1., got"),
    ],
)
def test_other_dtypes_and_ranges_raise(video, message):
    with pytest.raises(ValueError, match=message) as error:
        metrics.psnr(video, video)
    assert "\n" not in str(error.value)


def test_rounding_errors_are_accepted():
    assert to_unit_range(clip(0) / 255 * (1 + 5e-4)).dtype == np.float64


def test_per_frame():
    a, b = clip(0), clip(1)
    frames = metrics.per_frame(metrics.psnr, a, b)
    assert frames == [metrics.psnr(a[i : i + 1], b[i : i + 1]) for i in range(3)]
    assert np.mean(metrics.per_frame(metrics.ssim, a, b)) == pytest.approx(metrics.ssim(a, b))
    assert np.mean(metrics.per_frame(metrics.ms_ssim, a, b)) == pytest.approx(metrics.ms_ssim(a, b))


def test_summary_statistics_of_known_values():
    values = [float(x) for x in np.random.default_rng(0).permutation(30)]
    assert metrics.summary_statistics(values) == {"mean": 14.5, "median": 14.5, "worst_decile": 1.0}
    assert metrics.summary_statistics(values, larger_is_better=False)["worst_decile"] == 28.0
    assert metrics.summary_statistics([3.0]) == {"mean": 3.0, "median": 3.0, "worst_decile": 3.0}
    assert metrics.summary_statistics([math.inf, 20.0, math.inf]) == {
        "mean": math.inf,
        "median": math.inf,
        "worst_decile": 20.0,
    }
    with pytest.raises(ValueError, match="at least one value"):
        metrics.summary_statistics([])


def strict_json(value: dict) -> dict:
    return json.loads(json.dumps(value, allow_nan=False))


def test_fidelity_has_all_metrics():
    a, b = clip(0), clip(1)
    result = strict_json(metrics.fidelity(a, b))
    assert list(result) == list(MEASURES)
    for name, metric in [("psnr", metrics.psnr), ("ssim", metrics.ssim), ("ms_ssim", metrics.ms_ssim)]:
        frames = metrics.per_frame(metric, a, b)
        assert result[name]["pooled"] == pytest.approx(metric(a, b))
        assert result[name]["frames"] == frames
        assert {key: result[name][key] for key in ("mean", "median", "worst_decile")} == metrics.summary_statistics(
            frames
        )
    assert result["ms_ssim"]["scales"] == 1


def test_infinite_psnr_is_valid_json():
    a, b = clip(0), clip(0)
    b[1] = clip(1)[1]
    result = strict_json(metrics.fidelity(a, a))
    assert result["psnr"]["pooled"] == "inf" and float(result["psnr"]["worst_decile"]) == math.inf
    assert result["ssim"]["pooled"] == pytest.approx(1)
    result = strict_json(metrics.fidelity(a, b))["psnr"]
    assert [type(x) for x in result["frames"]] == [str, float, str]
    assert result["worst_decile"] == result["frames"][1] and result["pooled"] > result["worst_decile"]


@pytest.mark.parametrize("shape", [(1, 20, 27), (2, 7, 5), (1, 3, 4)], ids=str)
def test_fidelity_of_few_and_small_frames(shape):
    result = strict_json(metrics.fidelity(clip(0, *shape), clip(1, *shape)))
    assert len(result["ssim"]["frames"]) == shape[0]
    assert "at least 31 x 31" in result["lpips"]["unavailable"]


def test_relative_error_in_closed_form():
    reference = torch.tensor([[3.0, 4.0]])
    assert metrics.relative_error(reference * 1.5, reference) == pytest.approx(0.5)
    assert metrics.relative_error(np.array([3.0, 5.0]), np.array([3.0, 4.0])) == pytest.approx(0.2)
    assert metrics.relative_error(reference.bfloat16(), reference) == 0
    assert metrics.relative_error(reference, reference * 0) == math.inf
    assert metrics.relative_error(reference * 0, reference * 0) == 0
    with pytest.raises(ValueError, match="the same shape"):
        metrics.relative_error(reference, reference[0])


@pytest.fixture
def empty_hub_cache(monkeypatch, tmp_path):
    """An empty cache of torch.hub, and no LPIPS model loaded."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    lpips_distance._model.cache_clear()
    yield tmp_path
    lpips_distance._model.cache_clear()


class FakeLPIPS(torch.nn.Module):
    """The mean absolute difference, scaled to [-1, 1] as ``normalize`` does."""

    def __init__(self, net, verbose):
        super().__init__()
        assert net == "alex"

    def forward(self, a, b, normalize):
        assert normalize and a.shape[1] == 3 and a.dtype == torch.float32
        return (a - b).abs().mean((1, 2, 3), keepdim=True) * 2


def test_missing_lpips_is_unavailable(monkeypatch, empty_hub_cache):
    a, b = clip(0, 2, 40, 33), clip(1, 2, 40, 33)
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(Unavailable, match="pip install lpips"):
        metrics.lpips(a, b)
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=FakeLPIPS))
    with pytest.raises(Unavailable, match=r"alexnet-owt-7be5be79\.pth are missing; get them with: python"):
        metrics.lpips(a, b)
    assert metrics.fidelity(a, b)["lpips"].keys() == {"unavailable"}


@pytest.mark.parametrize("channels", [1, 3])
def test_lpips_covers_all_frames_in_batches(monkeypatch, empty_hub_cache, channels):
    (empty_hub_cache / "checkpoints").mkdir()
    (empty_hub_cache / "checkpoints" / lpips_distance.ALEXNET).write_text("")
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=FakeLPIPS))
    a, b = (clip(seed, 37, 31, 40)[..., :channels] for seed in (0, 1))
    expected = [2 * np.abs(x / 255 - y / 255).mean() for x, y in zip(a, b, strict=True)]
    assert metrics.lpips(a, b) == pytest.approx(np.mean(expected), rel=1e-5)
    result = metrics.fidelity(a, b)["lpips"]
    assert result["frames"] == pytest.approx(expected, rel=1e-5)
    assert result["worst_decile"] == pytest.approx(np.mean(sorted(expected)[-3:]), rel=1e-5)


def test_displayed_paths_do_not_contain_the_user_name(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert display_path(tmp_path / "a" / "b") == "~/a/b"
    assert display_path(tmp_path.parent) == str(tmp_path.parent)
