"""Metrics, files, pictures, retained mass, tables and the demo itself."""

import json
import math
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dit_sparse import Grid, Plan, Site, SparseAttnProcessor
from dit_sparse.demo.demo import Demo
from dit_sparse.eval.analysis.retained_mass import retained_mass
from dit_sparse.eval.quality import fidelity as metrics
from dit_sparse.eval.report import readme as table
from dit_sparse.kernels.executors import reference
from dit_sparse.methods import method
from dit_sparse.output import files, media


def clip(seed: int, frames: int = 3, height: int = 20, width: int = 27) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def test_metrics_agree_with_scikit_image():
    a, b = clip(0), clip(1)
    assert metrics.psnr(a, b) == pytest.approx(peak_signal_noise_ratio(b, a, data_range=255))
    expected = np.mean([structural_similarity(x, y, channel_axis=-1) for x, y in zip(a, b, strict=True)])
    assert metrics.ssim(a, b) == pytest.approx(expected, abs=1e-6)


def test_metrics_do_not_mind_the_number_type_and_know_identity():
    a, b = clip(0), clip(1)
    assert metrics.psnr(a / 255.0, b) == pytest.approx(metrics.psnr(a, b))
    assert metrics.psnr(a, a) == math.inf
    assert metrics.ssim(a, a) == pytest.approx(1)
    assert metrics.ssim(clip(0, 1, 5, 4), clip(0, 1, 5, 4)) == pytest.approx(1)


def test_metrics_refuse_what_cannot_be_compared():
    with pytest.raises(ValueError, match="the same shape"):
        metrics.psnr(clip(0), clip(0, frames=4))
    with pytest.raises(ValueError, match="the same shape"):
        metrics.ssim(clip(0)[0], clip(0)[0])


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(RuntimeError, match="midway"), files.atomic_write(path) as draft:
        draft.write_text("half")
        raise RuntimeError("midway")
    assert list(tmp_path.iterdir()) == []
    files.save_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write into"):
        files.writable_folder(tmp_path / "file" / "below")


@pytest.mark.parametrize("shape", [(3, 20, 27), (1, 33, 15), (4, 400, 401)])
def test_videos_are_saved_large_enough_and_even(tmp_path, shape):
    media.save_video(tmp_path / "x.mp4", clip(0, *shape), fps=8)
    video = imageio.imread(tmp_path / "x.mp4")
    assert len(video) == shape[0]
    assert video.shape[1] >= 384
    assert not video.shape[1] % 2 and not video.shape[2] % 2


@pytest.mark.parametrize("name", ["radial", "window", "random_blocks"])
def test_retained_mass_is_the_ratio_of_partition_functions(name):
    grid = Grid(3, 5, 7, after=9)
    q, k = torch.randn(2, 2, 4, grid.tokens, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    plan = method(name, density=0.5).plan(q, k, k, Site(grid, 16), {}).with_lengths(torch.tensor([114, 108]))
    everything = Plan.dense(grid.tokens, 16).with_lengths(plan.lengths)
    kept, total = (reference.attend(q, k, k, p)[1] for p in (plan, everything))
    mass = retained_mass(q, k, plan, rows=grid.tokens)
    torch.testing.assert_close(mass, (kept - total).exp().mean(-1), atol=1e-5, rtol=1e-4)


def test_side_by_side_keeps_both_clips():
    a, b = clip(0, 2, 96, 96), clip(1, 2, 96, 96)
    both = media.side_by_side(a, b, ("dense", "sparse"))
    assert np.array_equal(both[:, 28::4, :384:4], a)
    assert np.array_equal(both[:, 28::4, 392::4], b)


@pytest.mark.parametrize("page", table.PAGES)
def test_generated_tables_are_current(page):
    text = (Path(table.ROOT) / page).read_text()
    assert table.update_tables(text) == text, "run python -m dit_sparse.eval.report.readme"


def test_the_demo_writes_what_it_promises(tmp_path):
    call = {"num_inference_steps": 3, "num_frames": 3, "height": 64, "width": 64}
    stages = []

    def stage(name):
        return lambda done, steps: stages.append((name, done, steps))

    processor = SparseAttnProcessor("radial", density=0.3, dense_steps=1, executor="cpu")  # "auto" depends on times
    result = Demo("a red circle moves right", processor, tmp_path, call=call).run(stage)
    assert stages == [(name, step, 3) for name in ("dense", "sparse") for step in (1, 2, 3)]
    expected = {"dense.mp4", "sparse.mp4", "difference.mp4", "side-by-side.mp4", "mask.png", "retained.png"}
    expected |= {"attention.png", "result.json"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert json.loads((tmp_path / "result.json").read_text()) == result
    expected = "method density_asked density_achieved density_run seconds_dense seconds_sparse attention_seconds_dense "
    expected += "attention_seconds_sparse speedup psnr ssim executor grid steps device versions commit"
    assert set(expected.split()) <= set(result)
    assert result["density_achieved"] == pytest.approx(0.3, abs=0.01)
    assert result["grid"] == "4x16x16"
    assert result["density_run"] == pytest.approx((1 + 2 * result["density_achieved"]) / 3)
    assert result["psnr"] > 10
    for kind in ("dense", "sparse"):
        assert len(result[f"attention_by_step_{kind}"]) == 3
        assert sum(result[f"attention_by_step_{kind}"]) == pytest.approx(result[f"attention_seconds_{kind}"])


def test_the_difference_is_black_where_clips_agree():
    a = clip(0)
    assert not media.difference(a, a).any()
    b = a.copy()
    b[1, 2, 3] = np.where(a[1, 2, 3] < 128, a[1, 2, 3] + 10, a[1, 2, 3] - 10)
    assert (media.difference(a, b)[1, 2, 3] == 40).all() and np.count_nonzero(media.difference(b, a)) == 3


def test_the_demo_of_dense_is_dense(tmp_path):
    call = {"num_inference_steps": 2, "num_frames": 1, "height": 64, "width": 64}
    result = Demo("a red circle moves up", SparseAttnProcessor("dense"), tmp_path, call=call).run(
        lambda name: lambda *_: None
    )
    assert result["psnr"] == math.inf and result["density_run"] == 1
