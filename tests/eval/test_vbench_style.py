"""VBench-style quality of single videos, against closed forms and known motion."""

import json
import socket
import sys
import types

import numpy as np
import pytest
import torch
from scipy import ndimage

from dit_sparse.eval.quality import learned_features as features
from dit_sparse.eval.quality import optical_flow
from dit_sparse.eval.quality import vbench_style as quality
from dit_sparse.eval.quality.unavailable import Unavailable


def noise(frames: int = 3, height: int = 20, width: int = 27, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def rolled(step: int, frames: int = 5, height: int = 64, width: int = 72) -> np.ndarray:
    """Return a smooth texture that moves ``step`` px to the right each frame."""
    texture = ndimage.gaussian_filter(np.random.default_rng(0).random((height, width, 3)), (2, 2, 0), mode="wrap")
    texture = (texture - texture.min()) / np.ptp(texture)
    return np.stack([np.roll(texture, step * i, axis=1) for i in range(frames)])


def test_a_still_clip_has_no_motion():
    still = noise(1).repeat(5, 0)
    assert quality.temporal_flickering(still) == 1
    assert quality.motion_smoothness(still) == pytest.approx(1, abs=1e-9)
    assert quality.dynamic_degree(still) == 0 and quality.flow_magnitude(still) == 0


def test_flickering_in_closed_form():
    ramp = np.arange(4)[:, None, None, None] * np.full((1, 5, 7, 3), 0.1)
    assert quality.temporal_flickering(ramp) == pytest.approx(0.9)
    blinking = np.array([0, 255, 0], np.uint8)[:, None, None, None].repeat(9, 1).repeat(9, 2)
    assert quality.temporal_flickering(blinking) == 0
    clip = noise()
    expected = (255 - np.abs(np.diff(clip.astype(float), axis=0)).mean()) / 255
    assert quality.temporal_flickering(clip) == pytest.approx(expected)
    assert quality.temporal_flickering(clip / 255) == pytest.approx(expected)


@pytest.mark.parametrize("step", [1, 2])
def test_a_translation_has_its_speed(step):
    clip = rolled(step)
    assert quality.flow_magnitude(clip) == pytest.approx(step, abs=0.1)
    assert quality.dynamic_degree(clip) == (step > 6 * 64 / 256)
    assert quality.motion_smoothness(clip) > 0.995
    blended = 1 - np.abs((clip[0] + clip[2]) / 2 - clip[1]).mean()
    assert 1 - quality.motion_smoothness(clip) < 0.5 * (1 - blended)


def test_speed_is_measured_at_eight_frames_per_second():
    clip = rolled(1, frames=7)
    assert quality.flow_magnitude(clip, fps=16) == pytest.approx(2, abs=0.1)
    assert quality.dynamic_degree(clip, fps=16) == 1 and quality.dynamic_degree(clip, fps=8) == 0


def test_a_quarter_of_the_frames_must_move():
    moves = rolled(2, frames=3)
    still = moves[-1:].repeat(13, 0)
    assert quality.dynamic_degree(np.concatenate([moves, still[:5]])) == 1  # 2 of 8 frames
    assert quality.dynamic_degree(np.concatenate([moves, still])) == 0  # 2 of 16


def test_flow_of_large_frames_is_computed_at_lower_resolution(monkeypatch):
    monkeypatch.setattr(optical_flow, "MAX_SIDE", 40)
    clip = rolled(2, frames=3)
    assert quality.flow_magnitude(clip) == pytest.approx(2, abs=0.15)
    assert quality.motion_smoothness(clip) > 0.99


def test_jerky_motion_is_less_smooth():
    steady, jerky = rolled(2), rolled(2)[[0, 2, 1, 3, 4]]
    assert quality.motion_smoothness(jerky) < quality.motion_smoothness(steady) - 0.005
    blinking = np.array([0.0, 1.0, 0.0])[:, None, None, None] * np.ones((1, 16, 16, 3))
    assert quality.motion_smoothness(blinking) == pytest.approx(0, abs=1e-9)


def reference_consistency(embeddings: np.ndarray) -> float:
    def cosine(a, b):
        return max(0.0, float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))

    pairs = [(cosine(embeddings[0], embeddings[i]) + cosine(embeddings[i - 1], embeddings[i])) / 2 for i in range(1, 6)]
    return float(np.mean(pairs))


def test_consistency_is_the_formula_of_vbench(monkeypatch):
    embeddings = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    expected = pytest.approx(reference_consistency(embeddings), abs=1e-6)
    assert quality.consistency(torch.from_numpy(embeddings)) == expected
    assert quality.consistency(torch.ones(3, 4)) == pytest.approx(1)
    assert quality.consistency(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == 0
    repos, tensor = [], torch.from_numpy(embeddings)
    monkeypatch.setattr(features, "dino_features", lambda video: tensor)
    monkeypatch.setattr(features, "clip_image_features", lambda video, repo: repos.append(repo) or tensor)
    for measure in (quality.subject_consistency, quality.background_consistency):
        assert measure(noise(6)) == expected
    assert repos == ["openai/clip-vit-base-patch32"]


def test_text_consistency_is_a_mean_of_cosines(monkeypatch):
    monkeypatch.setattr(features, "clip_image_features", lambda video, repo: torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
    monkeypatch.setattr(features, "clip_text_features", lambda prompt, repo: torch.tensor([[3.0, 4.0]]))
    assert quality.clip_text_consistency(noise(2), "a cat") == pytest.approx((0.6 + 0.8) / 2)


def test_aesthetic_quality_applies_the_linear_head(monkeypatch, tmp_path):
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(features, "clip_image_features", lambda video, repo: torch.tensor([[0.0, 5.0], [7.0, 0.0]]))
    with pytest.raises(Unavailable, match=r"sa_0_4_vit_l_14_linear\.pth are missing; get them with: wget"):
        quality.aesthetic_quality(noise(2))
    (tmp_path / "aesthetic_model/emb_reader").mkdir(parents=True)
    head = {"weight": torch.tensor([[2.0, 4.0]]), "bias": torch.tensor([1.0])}
    torch.save(head, tmp_path / "aesthetic_model/emb_reader" / features.AESTHETIC)
    assert quality.aesthetic_quality(noise(2)) == pytest.approx((5 + 3) / 2 / 10)


def test_imaging_quality_is_the_mean_musiq_score(monkeypatch, tmp_path):
    class Model(torch.nn.Module):
        def __init__(self, pretrained_model_path):
            super().__init__()
            assert pretrained_model_path.endswith(features.MUSIQ)

        def forward(self, frames):
            assert frames.shape == (1, 3, 102, 512) and not self.training
            return 100 * frames.mean()

    features._musiq_model.cache_clear()
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(Unavailable, match="pip install pyiqa"):
        quality.imaging_quality(noise())
    for name in ("pyiqa", "pyiqa.archs", "pyiqa.archs.musiq_arch"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(MUSIQ=Model))
    with pytest.raises(Unavailable, match=r"musiq_spaq_ckpt-358bb6af\.pth are missing; get them with: wget"):
        quality.imaging_quality(noise())
    (tmp_path / "pyiqa_model").mkdir()
    (tmp_path / "pyiqa_model" / features.MUSIQ).write_text("")
    clip = np.full((3, 120, 600, 3), 0.25) * np.array([1, 2, 3])[:, None, None, None]
    assert quality.imaging_quality(clip) == pytest.approx(0.5)
    features._musiq_model.cache_clear()


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory):
    """DINO and CLIP with random weights, in folders of Hugging Face's layout."""
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
        ViTConfig,
        ViTModel,
    )

    folder, small = tmp_path_factory.mktemp("models"), {"hidden_size": 16, "intermediate_size": 16}
    small |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**small), add_pooling_layer=False).save_pretrained(folder / "dino")
    vision = CLIPVisionConfig(**small, image_size=224, patch_size=32, projection_dim=6)
    text = CLIPTextConfig(**small, vocab_size=8, projection_dim=6, bos_token_id=6, eos_token_id=7)
    CLIPVisionModelWithProjection(vision).save_pretrained(folder / "vision")
    CLIPTextModelWithProjection(text).save_pretrained(folder / "text")
    signs = ["a", "b", "a</w>", "b</w>", "ab</w>", "!", "<|startoftext|>", "<|endoftext|>"]
    (folder / "text" / "vocab.json").write_text(json.dumps({sign: i for i, sign in enumerate(signs)}))
    (folder / "text" / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    return folder


def test_features_come_from_local_models(monkeypatch, tiny_models):
    features._load_local.cache_clear()
    monkeypatch.setattr(features, "DINO", str(tiny_models / "dino"))
    monkeypatch.setattr(features, "BATCH", 2)
    clip = noise(3, 20, 37) / 255
    embeddings = features.dino_features(clip)
    assert embeddings.shape == (3, 16)
    torch.testing.assert_close(embeddings[2:], features.dino_features(clip[2:]), atol=1e-5, rtol=1e-4)
    images = features.clip_image_features(clip, str(tiny_models / "vision"))
    assert images.shape == (3, 6)
    grey = clip[..., :1].repeat(3, -1)
    torch.testing.assert_close(
        features.clip_image_features(grey, str(tiny_models / "vision")),
        features.clip_image_features(grey[..., :1], str(tiny_models / "vision")),
    )
    texts = [features.clip_text_features(prompt, str(tiny_models / "text")) for prompt in ("ab", "b", "ab " * 100)]
    assert texts[0].shape == (1, 6) and not torch.allclose(texts[0], texts[1])
    features._load_local.cache_clear()


def test_images_are_center_crops():
    clip = np.zeros((1, 224, 424, 3))
    clip[:, :, 100:324] = 0.5
    (frames,) = features._batches(clip)
    square = features._center_crop(features._resize_shorter_side(frames, "bicubic"))
    assert square.shape == (1, 3, 224, 224)
    torch.testing.assert_close(square, torch.full_like(square, 0.5))
    normalized = features._normalize(square, features.DINO_MEAN_STD)
    torch.testing.assert_close(
        normalized[0, :, 0, 0], torch.tensor([(0.5 - 0.485) / 0.229, 0.044 / 0.224, 0.094 / 0.225])
    )


def test_images_are_resized_without_smoothing(monkeypatch):
    """As in VBench's tool: at a third of the size only the middle one of three pixels is used."""
    stripes = np.zeros((1, 3 * 224, 3 * 224, 3))
    stripes[:, :, 1::3] = 1
    (frames,) = features._batches(stripes)
    for mode in ("bilinear", "bicubic"):
        torch.testing.assert_close(features._resize_shorter_side(frames, mode), torch.ones(1, 3, 224, 224))
    edge = torch.zeros(1, 3, 100, 100)
    edge[..., 50:] = 1
    enlarged = features._resize_shorter_side(edge, "bicubic")
    assert enlarged.min() == 0 and enlarged.max() == 1
    inputs = []
    monkeypatch.setattr(features, "_musiq_model", lambda: lambda frames: inputs.append(frames) or torch.tensor(1.0))
    features.musiq_scores(np.tile(stripes[:, : 1536 // 2], (1, 1, 3, 1))[:, :, :1536])
    assert inputs[0].shape[3] == 512 and inputs[0].min() == 1


def no_network(*arguments, **settings):
    raise AssertionError("the network was used")


REASONS = {
    "imaging_quality": "pip install pyiqa",
    "aesthetic_quality": "hf download no-such-owner/large",
    "subject_consistency": "hf download no-such-owner/dino",
    "background_consistency": "hf download no-such-owner/base",
    "overall_consistency": "ViClip-InternVid-10M-FLT.pth",
    "clip_text_consistency": "hf download no-such-owner/base",
}


def test_missing_weights_are_reported_and_not_downloaded(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    for name, repo in (("DINO", "dino"), ("CLIP_BASE", "base"), ("CLIP_LARGE", "large")):
        monkeypatch.setattr(features, name, f"no-such-owner/{repo}")
    scores = quality.quality(rolled(2, frames=3), "a texture")
    json.dumps(scores, allow_nan=False)
    assert list(scores) == list(quality.dimensions())
    assert all(len(text) > 40 for text in quality.dimensions().values())
    for name, value in scores.items():
        if name in REASONS:
            assert REASONS[name] in value["unavailable"], name
        else:
            assert isinstance(value, float), name
    assert quality.quality(rolled(2, frames=3))["clip_text_consistency"] == {"unavailable": "it needs the prompt"}


@pytest.mark.parametrize(("frames", "missing"), [(1, {"temporal_flickering", "dynamic_degree"}), (2, set())])
def test_short_clips_have_unavailable_dimensions(frames, missing):
    scores = quality.quality(noise(frames, 13, 9))
    for name in missing | {"motion_smoothness"}:
        assert f"frames, got {frames}" in scores[name]["unavailable"]
    if frames == 2:
        assert isinstance(scores["flow_magnitude"], float)


def test_arrays_that_are_no_videos_raise():
    with pytest.raises(ValueError, match="a video must be"):
        quality.quality(noise()[0])
    assert "at least 8 x 8" in quality.quality(noise(3, 7, 20))["dynamic_degree"]["unavailable"]
