"""Quality without a reference, and the files for VBench's own tool."""

import json
import socket
import sys
import types

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from scipy import ndimage

from dit_sparse.eval.quality import learned
from dit_sparse.eval.quality import vbench_style as quality
from dit_sparse.eval.quality.fidelity import Unavailable
from dit_sparse.eval.quality.vbench_export import ANY_PROMPT, export, file_name


def noise(frames: int = 3, height: int = 20, width: int = 27, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def rolled(step: int, frames: int = 5, height: int = 64, width: int = 72) -> np.ndarray:
    """A smooth texture that moves ``step`` px to the right each frame."""
    texture = ndimage.gaussian_filter(np.random.default_rng(0).random((height, width, 3)), (2, 2, 0), mode="wrap")
    texture = (texture - texture.min()) / np.ptp(texture)
    return np.stack([np.roll(texture, step * i, axis=1) for i in range(frames)])


def test_a_still_clip_is_calm():
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
def test_a_known_translation_has_its_speed(step):
    clip = rolled(step)
    assert quality.flow_magnitude(clip) == pytest.approx(step, abs=0.1)
    assert quality.dynamic_degree(clip) == (step > 6 * 64 / 256)
    assert quality.motion_smoothness(clip) > 0.995
    blended = 1 - np.abs((clip[0] + clip[2]) / 2 - clip[1]).mean()
    assert 1 - quality.motion_smoothness(clip) < 0.5 * (1 - blended)


def test_speed_is_counted_at_eight_frames_a_second():
    clip = rolled(1, frames=7)
    assert quality.flow_magnitude(clip, fps=16) == pytest.approx(2, abs=0.1)
    assert quality.dynamic_degree(clip, fps=16) == 1 and quality.dynamic_degree(clip, fps=8) == 0


def test_a_quarter_of_the_frames_must_move():
    moves = rolled(2, frames=3)
    still = moves[-1:].repeat(13, 0)
    assert quality.dynamic_degree(np.concatenate([moves, still[:5]])) == 1  # 2 of 8 frames
    assert quality.dynamic_degree(np.concatenate([moves, still])) == 0  # 2 of 16


def test_large_frames_are_reduced_and_speeds_scaled_back(monkeypatch):
    monkeypatch.setattr(quality, "FLOW_SIDE", 40)
    clip = rolled(2, frames=3)
    assert quality.flow_magnitude(clip) == pytest.approx(2, abs=0.15)
    assert quality.motion_smoothness(clip) > 0.99


def test_jerky_motion_is_less_smooth():
    steady, jerky = rolled(2), rolled(2)[[0, 2, 1, 3, 4]]
    assert quality.motion_smoothness(jerky) < quality.motion_smoothness(steady) - 0.005
    blinking = np.array([0.0, 1.0, 0.0])[:, None, None, None] * np.ones((1, 16, 16, 3))
    assert quality.motion_smoothness(blinking) == pytest.approx(0, abs=1e-9)


def slow_consistency(features: np.ndarray) -> float:
    def cosine(a, b):
        return max(0.0, float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))

    pairs = [(cosine(features[0], features[i]) + cosine(features[i - 1], features[i])) / 2 for i in range(1, 6)]
    return float(np.mean(pairs))


def test_consistency_is_the_formula_of_vbench(monkeypatch):
    features = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    assert quality.consistency(torch.from_numpy(features)) == pytest.approx(slow_consistency(features), abs=1e-6)
    assert quality.consistency(torch.ones(3, 4)) == pytest.approx(1)
    assert quality.consistency(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == 0
    asked = []
    monkeypatch.setattr(learned, "dino", lambda video: torch.from_numpy(features))
    monkeypatch.setattr(learned, "clip_image", lambda video, repo: asked.append(repo) or torch.from_numpy(features))
    for measure in (quality.subject_consistency, quality.background_consistency):
        assert measure(noise(6)) == pytest.approx(slow_consistency(features), abs=1e-6)
    assert asked == ["openai/clip-vit-base-patch32"]


def test_text_consistency_is_a_mean_of_cosines(monkeypatch):
    monkeypatch.setattr(learned, "clip_image", lambda video, repo: torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
    monkeypatch.setattr(learned, "clip_text", lambda prompt, repo: torch.tensor([[3.0, 4.0]]))
    assert quality.clip_text_consistency(noise(2), "a cat") == pytest.approx((0.6 + 0.8) / 2)


def test_aesthetic_quality_is_the_linear_head(monkeypatch, tmp_path):
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(learned, "clip_image", lambda video, repo: torch.tensor([[0.0, 5.0], [7.0, 0.0]]))
    with pytest.raises(Unavailable, match=r"sa_0_4_vit_l_14_linear\.pth are not there; get them with: wget"):
        quality.aesthetic_quality(noise(2))
    (tmp_path / "aesthetic_model/emb_reader").mkdir(parents=True)
    head = {"weight": torch.tensor([[2.0, 4.0]]), "bias": torch.tensor([1.0])}
    torch.save(head, tmp_path / "aesthetic_model/emb_reader" / learned.AESTHETIC)
    assert quality.aesthetic_quality(noise(2)) == pytest.approx((5 + 3) / 2 / 10)


def test_imaging_quality_asks_musiq_for_every_frame(monkeypatch, tmp_path):
    class Model(torch.nn.Module):
        def __init__(self, pretrained_model_path):
            super().__init__()
            assert pretrained_model_path.endswith(learned.MUSIQ)

        def forward(self, frames):
            assert frames.shape == (1, 3, 102, 512) and not self.training
            return 100 * frames.mean()

    learned._musiq_model.cache_clear()
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(Unavailable, match="pip install pyiqa"):
        quality.imaging_quality(noise())
    for name in ("pyiqa", "pyiqa.archs", "pyiqa.archs.musiq_arch"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(MUSIQ=Model))
    with pytest.raises(Unavailable, match=r"musiq_spaq_ckpt-358bb6af\.pth are not there; get them with: wget"):
        quality.imaging_quality(noise())
    (tmp_path / "pyiqa_model").mkdir()
    (tmp_path / "pyiqa_model" / learned.MUSIQ).write_text("")
    clip = np.full((3, 120, 600, 3), 0.25) * np.array([1, 2, 3])[:, None, None, None]
    assert quality.imaging_quality(clip) == pytest.approx(0.5)
    learned._musiq_model.cache_clear()


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory):
    """A DINO and a CLIP of random weights in the layout of Hugging Face."""
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


def test_features_of_local_models(monkeypatch, tiny_models):
    learned._local.cache_clear()
    monkeypatch.setattr(learned, "DINO", str(tiny_models / "dino"))
    monkeypatch.setattr(learned, "BATCH", 2)
    clip = noise(3, 20, 37) / 255
    features = learned.dino(clip)
    assert features.shape == (3, 16)
    torch.testing.assert_close(features[2:], learned.dino(clip[2:]), atol=1e-5, rtol=1e-4)
    images = learned.clip_image(clip, str(tiny_models / "vision"))
    assert images.shape == (3, 6)
    grey = clip[..., :1].repeat(3, -1)
    torch.testing.assert_close(
        learned.clip_image(grey, str(tiny_models / "vision")),
        learned.clip_image(grey[..., :1], str(tiny_models / "vision")),
    )
    texts = [learned.clip_text(prompt, str(tiny_models / "text")) for prompt in ("ab", "b", "ab " * 100)]
    assert texts[0].shape == (1, 6) and not torch.allclose(texts[0], texts[1])
    learned._local.cache_clear()


def test_pictures_are_the_square_in_the_middle():
    clip = np.zeros((1, 224, 424, 3))
    clip[:, :, 100:324] = 0.5
    (frames,) = learned._batches(clip)
    square = learned._middle(learned._shorter_side(frames, "bicubic"))
    assert square.shape == (1, 3, 224, 224)
    torch.testing.assert_close(square, torch.full_like(square, 0.5))
    coloured = learned._coloured(square, learned.DINO_COLOURS)
    torch.testing.assert_close(
        coloured[0, :, 0, 0], torch.tensor([(0.5 - 0.485) / 0.229, 0.044 / 0.224, 0.094 / 0.225])
    )


def test_pictures_are_resized_without_smoothing_as_by_the_tool(monkeypatch):
    """At a third of the size the pixel in the middle of three is all there is."""
    stripes = np.zeros((1, 3 * 224, 3 * 224, 3))
    stripes[:, :, 1::3] = 1
    (frames,) = learned._batches(stripes)
    for mode in ("bilinear", "bicubic"):
        torch.testing.assert_close(learned._shorter_side(frames, mode), torch.ones(1, 3, 224, 224))
    edge = torch.zeros(1, 3, 100, 100)
    edge[..., 50:] = 1
    enlarged = learned._shorter_side(edge, "bicubic")
    assert enlarged.min() == 0 and enlarged.max() == 1
    seen = []
    monkeypatch.setattr(learned, "_musiq_model", lambda: lambda frames: seen.append(frames) or torch.tensor(1.0))
    learned.musiq(np.tile(stripes[:, : 1536 // 2], (1, 1, 3, 1))[:, :, :1536])
    assert seen[0].shape[3] == 512 and seen[0].min() == 1


def no_network(*arguments, **settings):
    raise AssertionError("the network was used")


LEARNED = {
    "imaging_quality": "pip install pyiqa",
    "aesthetic_quality": "hf download nobody/large",
    "subject_consistency": "hf download nobody/dino",
    "background_consistency": "hf download nobody/base",
    "overall_consistency": "ViClip-InternVid-10M-FLT.pth",
    "clip_text_consistency": "hf download nobody/base",
}


def test_what_is_missing_is_said_and_not_fetched(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    for name, repo in (("DINO", "dino"), ("CLIP_BASE", "base"), ("CLIP_LARGE", "large")):
        monkeypatch.setattr(learned, name, f"nobody/{repo}")
    found = quality.quality(rolled(2, frames=3), "a texture")
    json.dumps(found, allow_nan=False)
    assert list(found) == list(quality.dimensions())
    assert all(len(text) > 40 for text in quality.dimensions().values())
    for name, value in found.items():
        if name in LEARNED:
            assert LEARNED[name] in value["unavailable"], name
        else:
            assert isinstance(value, float), name
    assert quality.quality(rolled(2, frames=3))["clip_text_consistency"] == {"unavailable": "it needs the prompt"}


@pytest.mark.parametrize(("frames", "missing"), [(1, {"temporal_flickering", "dynamic_degree"}), (2, set())])
def test_short_clips_have_fewer_dimensions(frames, missing):
    found = quality.quality(noise(frames, 13, 9))
    for name in missing | {"motion_smoothness"}:
        assert f"and there are {frames}" in found[name]["unavailable"]
    if frames == 2:
        assert isinstance(found["flow_magnitude"], float)


def test_what_is_no_video_is_refused():
    with pytest.raises(ValueError, match="a video is"):
        quality.quality(noise()[0])
    assert "at least 8 x 8" in quality.quality(noise(3, 7, 20))["dynamic_degree"]["unavailable"]


def test_videos_for_vbench_have_their_names_and_lists(tmp_path):
    clips = [("a cat runs", 0, noise(4, 33, 47)), ("a cat runs", 1, noise(1, 20, 27) / 255), ("x/y", 0, noise())]
    info = export(tmp_path, (clip for clip in clips), fps=16)
    names = sorted(path.name for path in (tmp_path / "videos").iterdir())
    assert names == ["a cat runs-0.mp4", "a cat runs-1.mp4", file_name("x/y", 0)]
    listed = json.loads(info.read_text())
    assert [entry["prompt_en"] for entry in listed] == ["a cat runs", "x/y"]
    assert listed[0]["dimension"] == list(ANY_PROMPT)
    assert listed[0]["video_list"] == [str(tmp_path / "videos" / name) for name in names[:2]]
    assert json.loads((tmp_path / "prompts.json").read_text())[names[2]] == "x/y"
    assert imageio.immeta(listed[0]["video_list"][0])["fps"] == 16
    saved = imageio.imread(listed[0]["video_list"][0])
    assert saved.shape == clips[0][2].shape
    assert np.abs(saved.astype(int) - clips[0][2]).max() <= 3


def test_an_export_is_continued_and_never_overwritten(tmp_path):
    export(tmp_path, [("a cat", 0, noise())], dimensions=["dynamic_degree"])
    info = export(tmp_path, [("a cat", 0, noise()), ("a cat", 1, noise(seed=1))], dimensions=["dynamic_degree"])
    assert len(json.loads(info.read_text())[0]["video_list"]) == 2
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    for clips, dimension, message in [
        ([("a cat", 0, noise(seed=2))], "dynamic_degree", "another content"),
        ([("a cat", 2, noise())], "imaging_quality", "other dimensions"),
        ([("a dog", 0, noise()[0])], "dynamic_degree", "a clip for VBench"),
        ([("a dog", 0, noise())], "beauty", "no dimension beauty"),
        ([(" ", 0, noise())], "dynamic_degree", "named by its prompt"),
    ]:
        with pytest.raises(ValueError, match=message):
            export(tmp_path, clips, dimensions=[dimension])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


@pytest.mark.parametrize("content", ["{}", "[1]", "[", '[{"prompt_en": "a"}]'])
def test_other_lists_are_left_alone(tmp_path, content):
    (tmp_path / "full_info.json").write_text(content)
    with pytest.raises(ValueError, match="is no list of VBench videos"):
        export(tmp_path, [("a cat", 0, noise())])
    assert (tmp_path / "full_info.json").read_text() == content


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write into"):
        export(tmp_path / "file" / "below", [])


def test_file_names_are_safe_and_no_two_alike():
    assert file_name("A 3D model of a 1800s victorian house.", 4) == "A 3D model of a 1800s victorian house.-4.mp4"
    odd = ["a/b", "a\\b", "a\nb", "a_b", "é" * 200, "é" * 201]
    names = [file_name(prompt, 0) for prompt in odd]
    assert len(set(names)) == len(odd)
    assert all(len(name.encode()) <= 247 and "/" not in name and "\n" not in name for name in names)
