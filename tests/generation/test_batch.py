"""Batches: finished clips are kept, failures are retried, signals end a batch, and old folders are resumed."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from batches import batch_of_any_prompts as Batch
from batches import file_names, make_rows, silent_stage, write_file
from dit_sparse.cli.main import app
from dit_sparse.generation import batch as module
from dit_sparse.generation import clip_folder
from dit_sparse.generation.batch import Interrupted
from dit_sparse.generation.generate import Clip
from dit_sparse.generation.processes import file_lock


@pytest.fixture
def generated(monkeypatch) -> list:
    """Prompts and seeds of the clips; generating one takes no time."""

    class Pipe:
        sparse_run = type("Run", (), {"report": lambda self: type("R", (), {"as_dict": lambda self: {}})()})()

        def set_attn_processor(self, processor):
            pass

    requests = []

    def generate(pipe, prompt, seed, call, progress):
        requests.append((prompt, seed))
        for step in (1, 2):
            progress(step, 2)
        return Clip(np.full((2, 16, 16, 3), seed, np.uint8), 0.5)

    monkeypatch.setattr(module, "load_pipeline", lambda model, options: Pipe())
    monkeypatch.setattr(module, "prepare", lambda pipe: pipe)
    monkeypatch.setattr(module, "generate", generate)
    return requests


def test_every_row_and_seed_is_generated_once(tmp_path, generated):
    task = Batch(make_rows("a", "b"), tmp_path, seed=5, seeds=2)
    manifest = task.run(silent_stage)
    assert generated == [("a", 5), ("a", 6), ("b", 5), ("b", 6)] and manifest["count"] == {
        "done": 4,
        "failed": 0,
        "missing": 0,
    }
    assert {p.name for p in tmp_path.glob("c0*")} == {f"c0-seed{s}.{kind}" for s in (5, 6) for kind in ("mp4", "json")}
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest
    assert Batch(make_rows("a", "b", "c"), tmp_path, seed=5, seeds=2).run(silent_stage)["count"]["done"] == 6
    assert generated[4:] == [("c", 5), ("c", 6)]


def test_a_video_without_json_is_generated_again_and_partial_files_are_removed(tmp_path, generated):
    Batch(make_rows("a", "b"), tmp_path).run(silent_stage)
    (tmp_path / "c0.json").unlink()
    for partial_file in (".c0.12ab9f.mp4", ".c1.45ffff.json", ".manifest.678901.json"):
        write_file(tmp_path, partial_file, b"half")
    other_files = {".c0.x.12ab9f.mp4", ".hidden", ".c0.mp4", ".c0.backup.mp4", ".c0.2024.json"}
    for other_file in other_files:
        write_file(tmp_path, other_file, b"not ours")
    Batch(make_rows("a", "b"), tmp_path).run(silent_stage)
    assert generated == [("a", 0), ("b", 0), ("a", 0)]
    assert file_names(tmp_path) == {"c0.mp4", "c0.json", "c1.mp4", "c1.json", "manifest.json"} | other_files


def test_the_manifest_includes_clips_that_another_process_finishes_meanwhile(tmp_path, generated, monkeypatch):
    task, original = Batch(make_rows("a"), tmp_path), clip_folder.save_json
    task.run(silent_stage)
    result = (tmp_path / "c0.json").read_text()
    (tmp_path / "c0.json").unlink()
    generated.clear()

    def save_json(path, value):
        if path.name == "manifest.json":
            write_file(tmp_path, "c0.json", result)
        original(path, value)

    monkeypatch.setattr(module, "shard", lambda names_left: [])
    monkeypatch.setattr(clip_folder, "save_json", save_json)
    assert task.run(silent_stage)["count"]["done"] == 1 and not generated
    assert json.loads((tmp_path / "manifest.json").read_text())["count"]["done"] == 1


def test_a_video_that_does_not_fit_on_the_disk_is_not_done(tmp_path, generated, monkeypatch):
    resource = pytest.importorskip("resource")
    noise = np.random.default_rng(0).integers(0, 255, (4, 96, 96, 3), np.uint8)
    monkeypatch.setattr(module, "generate", lambda *_: Clip(noise, 0.5))
    task = Batch(make_rows("a"), tmp_path, retries=0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        manifest = task.run(silent_stage)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "is incomplete: is the disk full?" in manifest["clips"][0]["error"]
    assert file_names(tmp_path) == {"c0.json", "manifest.json"}
    assert task.run(silent_stage)["count"]["done"] == 1


@pytest.mark.parametrize("with_digest", [True, False])
def test_a_clip_whose_video_was_damaged_later_is_generated_again(tmp_path, generated, with_digest):
    task = Batch(make_rows("a", "b", "c"), tmp_path)
    task.run(silent_stage)
    if not with_digest:  # as in folders of older versions
        for path in tmp_path.glob("c*.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"video_sha256": None}))
    whole = (tmp_path / "c0.mp4").read_bytes()
    (tmp_path / "c0.mp4").write_bytes(whole[:-20])
    (tmp_path / "c1.mp4").unlink()
    assert task.run(silent_stage)["count"]["done"] == 3 and generated[3:] == [("a", 0), ("b", 0)]
    (tmp_path / "c2.mp4").write_bytes(whole[:200] + bytes(64) + whole[264:])
    task.run(silent_stage)
    assert generated[5:] == ([("c", 0)] if with_digest else [])


def test_a_clip_that_another_process_generates_is_left_alone(tmp_path, generated):
    task = Batch(make_rows("a", "b"), tmp_path)
    partial_file = write_file(tmp_path, ".c0.12ab9f.mp4", b"half")
    with file_lock(tmp_path / ".c0.lock") as acquired:
        assert acquired and task.run(silent_stage)["count"] == {"done": 1, "failed": 0, "missing": 1}
        assert generated == [("b", 0)] and partial_file.exists()
    assert task.run(silent_stage)["count"]["done"] == 2
    assert file_names(tmp_path) == {"c0.mp4", "c0.json", "c1.mp4", "c1.json", "manifest.json"}


def test_a_folder_in_the_place_of_a_file_is_refused_before_any_work(tmp_path):
    (tmp_path / "c1.mp4").mkdir()
    with pytest.raises(ValueError, match=r"c1\.mp4 exists and is not a file"):
        Batch(make_rows("a", "b"), tmp_path)


def test_clips_with_other_settings_are_not_overwritten(tmp_path, generated):
    Batch(make_rows("a"), tmp_path, settings={"density": 0.3}).run(silent_stage)
    with pytest.raises(ValueError, match="c0 with other settings"):
        Batch(make_rows("a"), tmp_path, settings={"density": 0.4})


OLD_RADIAL = {"density": 0.25, "decay": 0.95, "near": 1, "floor": 1.0, "sink": False}  # names of settings in 0.1


def test_a_folder_of_an_older_version_is_resumed(tmp_path, generated):
    Batch(make_rows("a", "b", method="radial"), tmp_path).run(silent_stage)
    path = tmp_path / "c0.json"
    result = json.loads(path.read_text())
    assert list(result["asked"]["settings"].values()) == list(OLD_RADIAL.values())
    old_schedule = {"dense_steps": 0.25, "dense_layers": 0, "every": 2, "per_branch": False}
    result["asked"] |= {"settings": OLD_RADIAL, "schedule": old_schedule}
    path.write_text(json.dumps(result))
    assert (
        Batch(make_rows("a", "b", method="radial"), tmp_path).run(silent_stage)["count"]["done"] == 2
        and len(generated) == 2
    )
    result["asked"]["settings"] = OLD_RADIAL | {"sink": True}
    path.write_text(json.dumps(result))
    with pytest.raises(ValueError, match="c0 with other settings"):
        Batch(make_rows("a", "b", method="radial"), tmp_path)


def test_rows_take_any_method(tmp_path):
    texts = ["radial", "radial(sink=true)", "asa(budget=mass(0.9))", "cached(svg)|radial", "profile:shapes-wan-i2v"]
    jobs = [Batch(make_rows("a", method=text), tmp_path).jobs()[0] for text in texts[:3] + texts[4:]]
    assert [str(job.processor.settings) for job in jobs] == [
        "radial, density 0.25",
        "radial(sink=true)",
        "asa(budget=mass(0.9))",
        "profile:shapes-wan-i2v",
    ]
    with pytest.raises(ValueError, match=r"c0: .*only patterns"):
        Batch(make_rows("a", method=texts[3]), tmp_path)
    with pytest.raises(ValueError, match=r"c0: profile:shapes-wan-i2v .* takes no density"):
        Batch(make_rows("a", method="profile:shapes-wan-i2v", density=0.3), tmp_path)


def test_settings_of_a_row_override_those_of_the_batch(tmp_path):
    task = Batch(
        make_rows("a", steps=3, guidance=0.0, density=0.5), tmp_path, settings={"density": 0.1}, call={"height": 48}
    )
    (job,) = task.jobs()
    assert job.call["num_inference_steps"] == 3 and job.call["guidance_scale"] == 0 and job.call["height"] == 48
    assert job.processor.settings.method.density == 0.5


def test_failures_are_retried_and_reported_and_do_not_end_the_batch(tmp_path, generated, monkeypatch):
    original, attempts = module.generate, []

    def generate(pipe, prompt, *rest):
        attempts.append(prompt)
        if prompt == "big":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if prompt == "huge":
            torch.empty(2**58)
        if prompt == "shaky" and attempts.count("shaky") < 2:
            raise RuntimeError("a hiccup\nwith details")
        if prompt == "broken":
            raise RuntimeError("never works")
        return original(pipe, prompt, *rest)

    monkeypatch.setattr(module, "generate", generate)
    manifest = Batch(make_rows("big", "shaky", "broken", "huge", "a"), tmp_path).run(silent_stage)
    assert attempts == ["big", "shaky", "shaky", "broken", "broken", "huge", "a"]
    assert [clip["status"] for clip in manifest["clips"]] == ["failed", "done", "failed", "failed", "done"]
    assert all("out of memory: use fewer frames" in manifest["clips"][big]["error"] for big in (0, 3))
    assert "never works" in manifest["clips"][2]["error"]
    Batch(make_rows("big", "shaky", "broken", "huge", "a"), tmp_path).run(silent_stage)
    assert attempts[7:] == ["big", "broken", "broken", "huge"]


def test_a_failed_clip_may_be_retried_with_other_settings(tmp_path, generated, monkeypatch):
    def generate(*_):
        raise torch.OutOfMemoryError("too many frames")

    with monkeypatch.context() as patch:
        patch.setattr(module, "generate", generate)
        assert Batch(make_rows("a", frames=81), tmp_path).run(silent_stage)["count"]["failed"] == 1
    assert Batch(make_rows("a", frames=41), tmp_path).run(silent_stage)["count"] == {
        "done": 1,
        "failed": 0,
        "missing": 0,
    }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_batch_after_the_step(tmp_path, generated, monkeypatch, number):
    original, steps = module.generate, []

    def generate(pipe, prompt, seed, call, progress):
        def result(step, count):
            if prompt == "b":
                os.kill(os.getpid(), number)
            steps.append((prompt, step))
            progress(step, count)

        return original(pipe, prompt, seed, call, result)

    monkeypatch.setattr(module, "generate", generate)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted):
        Batch(make_rows("a", "b", "c"), tmp_path).run(silent_stage)
    assert steps == [("a", 1), ("a", 2), ("b", 1)] and signal.getsignal(number) == before
    assert json.loads((tmp_path / "manifest.json").read_text())["count"] == {"done": 1, "failed": 0, "missing": 2}
    assert file_names(tmp_path) == {"c0.mp4", "c0.json", "manifest.json"}
    monkeypatch.setattr(module, "generate", original)
    assert Batch(make_rows("a", "b", "c"), tmp_path).run(silent_stage)["count"]["done"] == 3


def test_a_signal_after_the_last_step_ends_the_batch_before_the_next_clip(tmp_path, generated, monkeypatch):
    original, stages = module.generate, []

    def generate(*given):
        clip = original(*given)
        os.kill(os.getpid(), signal.SIGINT)
        return clip

    monkeypatch.setattr(module, "generate", generate)
    with pytest.raises(Interrupted):
        Batch(make_rows("a", "b"), tmp_path).run(lambda name: stages.append(name) or silent_stage(name))
    assert generated == [("a", 0)] and file_names(tmp_path) == {"c0.mp4", "c0.json", "manifest.json"}
    assert stages == ["clips", "stopping"]
    write_file(tmp_path, "p.txt", "a red circle moves up\na blue square moves down\n")
    run = CliRunner().invoke(app, ["batch", str(tmp_path / "p.txt"), "--out", str(tmp_path / "out")])
    assert run.exit_code == 130 and run.output.endswith("interrupted; run the same command again to resume\n"), (
        run.output
    )
