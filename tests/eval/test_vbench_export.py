"""Export of clips for VBench's own tool: names, lists, existing files."""

import json

import imageio.v3 as imageio
import numpy as np
import pytest

from dit_sparse.eval.quality.vbench_export import ANY_PROMPT, export, file_name


def noise(frames: int = 3, height: int = 20, width: int = 27, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def test_videos_and_lists_are_written(tmp_path):
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


def test_exports_are_extended_and_not_overwritten(tmp_path):
    export(tmp_path, [("a cat", 0, noise())], dimensions=["dynamic_degree"])
    info = export(tmp_path, [("a cat", 0, noise()), ("a cat", 1, noise(seed=1))], dimensions=["dynamic_degree"])
    assert len(json.loads(info.read_text())[0]["video_list"]) == 2
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    for clips, dimension, message in [
        ([("a cat", 0, noise(seed=2))], "dynamic_degree", "exists with different content"),
        ([("a cat", 2, noise())], "imaging_quality", "other dimensions"),
        ([("a dog", 0, noise()[0])], "dynamic_degree", "a clip for VBench"),
        ([("a dog", 0, noise())], "beauty", "no dimension beauty"),
        ([(" ", 0, noise())], "dynamic_degree", "needs a prompt"),
    ]:
        with pytest.raises(ValueError, match=message):
            export(tmp_path, clips, dimensions=[dimension])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


@pytest.mark.parametrize("content", ["{}", "[1]", "[", '[{"prompt_en": "a"}]'])
def test_other_lists_are_not_overwritten(tmp_path, content):
    (tmp_path / "full_info.json").write_text(content)
    with pytest.raises(ValueError, match="is not a list of VBench videos"):
        export(tmp_path, [("a cat", 0, noise())])
    assert (tmp_path / "full_info.json").read_text() == content


def test_unwritable_folders_raise(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write into"):
        export(tmp_path / "file" / "below", [])


def test_file_names_are_valid_and_unique():
    assert file_name("A 3D model of a 1800s victorian house.", 4) == "A 3D model of a 1800s victorian house.-4.mp4"
    prompts = ["a/b", "a\\b", "a\nb", "a_b", "é" * 200, "é" * 201]
    names = [file_name(prompt, 0) for prompt in prompts]
    assert len(set(names)) == len(prompts)
    assert all(len(name.encode()) <= 247 and "/" not in name and "\n" not in name for name in names)
