"""The batch: prompt files good and bad, what is skipped and tried again, real kills, two processes."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dit_sparse.cli import app
from dit_sparse.eval import batch as module
from dit_sparse.eval.batch import Batch, Stopped
from dit_sparse.eval.generate import Clip
from dit_sparse.eval.prompt_files import LONGEST_PROMPT, Row, file_name, read_rows

CALL = {"num_inference_steps": 2, "num_frames": 2, "height": 32, "width": 32}
SMALL = ["--steps", "2", "--frames", "2", "--height", "32", "--width", "32", "--dense-steps", "1"]
SMALL += ["--executor", "gather"]  # "auto" goes by what it measures, and clips are compared


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- prompt files


def test_a_prompt_a_line(tmp_path):
    path = written(tmp_path, "p.txt", b"\xef\xbb\xbfa red circle\r\n\n  a blue square \n")
    assert [(name, row.prompt) for name, row in read_rows(path)] == [
        ("0001-a_red_circle", "a red circle"),
        ("0002-a_blue_square", "a blue square"),
    ]


def test_rows_with_settings_of_their_own(tmp_path):
    table = 'id,prompt,seed,density,dense_steps\ncat,"a cat, sleeping",7,0.3,2\n,a dog,,,0.5\n'
    objects = '{"id": "cat", "prompt": "a cat, sleeping", "seed": 7, "density": 0.3, "dense_steps": 2}\n'
    objects += '{"prompt": "a dog", "dense_steps": 0.5}\n'
    first, second = (read_rows(written(tmp_path, *one)) for one in (("p.csv", table), ("p.jsonl", objects)))
    assert first == second
    assert first[0] == ("cat", Row(id="cat", prompt="a cat, sleeping", seed=7, density=0.3, dense_steps=2))
    assert first[1][0] == "0002-a_dog" and isinstance(first[0][1].dense_steps, int)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/absolute/x", "..", "a/b\\c", "con\n", ".hidden", "x" * 150, "日本", "~"]
)
def test_names_are_safe_and_differ(name):
    safe = file_name(Row(prompt="p", id=name), 1)
    assert safe and Path(safe).name == safe and not safe.startswith((".", "-")) and len(safe) <= 100 and safe.isascii()
    assert safe != file_name(Row(prompt="p", id=name + "!"), 1)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("p.txt", "", "no prompts"),
        ("p.txt", "a cat\n\xff\n".encode("latin-1"), "line 2: this is not UTF-8"),
        ("p.txt", "a cat\0\n", "line 1: a zero byte"),
        ("p.txt", "x" * 1_000_000, f"at most {LONGEST_PROMPT} characters"),
        ("p.csv", "text\na cat\n", "a column 'prompt'"),
        ("p.csv", "prompt\na cat,2\n", "line 2: more cells"),
        ("p.csv", "prompt,seed\na cat,many\n", "line 2: seed"),
        ("p.csv", "prompt,colour\na cat,red\n", "line 2: colour"),
        ("p.csv", 'prompt\n"a cat\n', "unexpected end of data"),
        ("p.csv", f"prompt\n{'x' * 200_000}\n", "field larger than field limit"),
        ("p.jsonl", '{"prompt": "a cat"}\n{"prompt"\n', "line 2: this is no JSON"),
        ("p.jsonl", '["a cat"]\n', "line 1"),
        ("p.jsonl", '{"prompt": "  "}\n', "the prompt is empty"),
        ("p.jsonl", '{"prompt": "a", "frames": 0}\n', "line 1: frames"),
        ("p.jsonl", '{"id": "a", "prompt": "a"}\n{"id": "A", "prompt": "b"}\n', "the name of line 1 too"),
        ("p.doc", "a cat", "prompts come as .txt, .csv, .jsonl"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_and_nothing_is_written(tmp_path, name, content, words):
    run = CliRunner().invoke(app, ["batch", str(written(tmp_path, name, content)), "--out", str(tmp_path / "out")])
    assert run.exit_code == 2 and words in run.output.replace("\n", " "), run.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "row, words",
    [
        ({"method": "nope"}, "no method 'nope'"),
        ({"density": 2}, "density is the fraction"),
        ({"id": "manifest"}, "would both be named manifest"),
    ],
)
def test_a_row_that_cannot_run_is_refused_before_any_work(tmp_path, row, words):
    path = written(tmp_path, "p.jsonl", json.dumps({"prompt": "a cat"} | row) + "\n")
    run = CliRunner().invoke(app, ["batch", str(path), "--out", str(tmp_path / "out")])
    assert run.exit_code == 2 and words in run.output.replace("\n", " "), run.output
    assert not list(tmp_path.glob("out/*"))


# --- what is done, tried again, left


@pytest.fixture
def made(monkeypatch) -> list:
    """Prompts and seeds of the clips that were asked for; none takes any time."""

    class Pipe:
        sparse_run = type("Run", (), {"report": lambda self: type("R", (), {"as_dict": lambda self: {}})()})()

        def set_attn_processor(self, processor):
            pass

    asked = []

    def generate(pipe, prompt, seed, call, progress):
        asked.append((prompt, seed))
        for step in (1, 2):
            progress(step, 2)
        return Clip(np.full((2, 16, 16, 3), seed, np.uint8), 0.5)

    monkeypatch.setattr(module, "load", lambda model: Pipe())
    monkeypatch.setattr(module, "prepare", lambda pipe: pipe)
    monkeypatch.setattr(module, "generate", generate)
    return asked


def rows(*prompts: str, **special) -> list:
    return [(f"c{number}", Row(prompt=prompt, **special)) for number, prompt in enumerate(prompts)]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def silent(name):
    return lambda done, steps: None


def test_every_row_and_seed_once_and_never_again(tmp_path, made):
    task = Batch(rows("a", "b"), tmp_path, seed=5, seeds=2)
    manifest = task.run(silent)
    assert made == [("a", 5), ("a", 6), ("b", 5), ("b", 6)] and manifest["count"] == {
        "done": 4,
        "failed": 0,
        "missing": 0,
    }
    assert {p.name for p in tmp_path.glob("c0*")} == {f"c0-seed{s}.{kind}" for s in (5, 6) for kind in ("mp4", "json")}
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest
    assert Batch(rows("a", "b", "c"), tmp_path, seed=5, seeds=2).run(silent)["count"]["done"] == 6
    assert made[4:] == [("c", 5), ("c", 6)]


def test_a_video_without_its_json_is_made_again_and_drafts_go(tmp_path, made):
    Batch(rows("a", "b"), tmp_path).run(silent)
    (tmp_path / "c0.json").unlink()
    written(tmp_path, ".c0.123.mp4", b"half")
    Batch(rows("a", "b"), tmp_path).run(silent)
    assert made == [("a", 0), ("b", 0), ("a", 0)]
    assert {path.name for path in tmp_path.iterdir()} == {"c0.mp4", "c0.json", "c1.mp4", "c1.json", "manifest.json"}


def test_other_settings_do_not_overwrite(tmp_path, made):
    Batch(rows("a"), tmp_path, usual={"density": 0.3}).run(silent)
    with pytest.raises(ValueError, match="c0 made with other settings"):
        Batch(rows("a"), tmp_path, usual={"density": 0.4})


def test_a_row_has_the_last_word(tmp_path):
    task = Batch(rows("a", steps=3, guidance=0.0, density=0.5), tmp_path, usual={"density": 0.1}, call={"height": 48})
    (job,) = task.jobs()
    assert job.call["num_inference_steps"] == 3 and job.call["guidance_scale"] == 0 and job.call["height"] == 48
    assert job.processor.settings.method.density == 0.5


def test_failures_are_tried_again_told_and_not_in_the_way(tmp_path, made, monkeypatch):
    good, tries = module.generate, []

    def generate(pipe, prompt, *rest):
        tries.append(prompt)
        if prompt == "big":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if prompt == "shaky" and tries.count("shaky") < 2:
            raise RuntimeError("a hiccup\nwith details")
        if prompt == "broken":
            raise RuntimeError("never works")
        return good(pipe, prompt, *rest)

    monkeypatch.setattr(module, "generate", generate)
    manifest = Batch(rows("big", "shaky", "broken", "a"), tmp_path).run(silent)
    assert tries == ["big", "shaky", "shaky", "broken", "broken", "a"]
    assert [clip["status"] for clip in manifest["clips"]] == ["failed", "done", "failed", "done"]
    assert "out of memory" in manifest["clips"][0]["error"] and "never works" in manifest["clips"][2]["error"]
    Batch(rows("big", "shaky", "broken", "a"), tmp_path).run(silent)
    assert tries[6:] == ["big", "broken", "broken"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_after_the_step(tmp_path, made, monkeypatch, number):
    quick, steps = module.generate, []

    def generate(pipe, prompt, seed, call, progress):
        def told(step, count):
            if prompt == "b":
                os.kill(os.getpid(), number)
            steps.append((prompt, step))
            progress(step, count)

        return quick(pipe, prompt, seed, call, told)

    monkeypatch.setattr(module, "generate", generate)
    before = signal.getsignal(number)
    with pytest.raises(Stopped):
        Batch(rows("a", "b", "c"), tmp_path).run(silent)
    assert steps == [("a", 1), ("a", 2), ("b", 1)] and signal.getsignal(number) == before
    assert json.loads((tmp_path / "manifest.json").read_text())["count"] == {"done": 1, "failed": 0, "missing": 2}
    assert files(tmp_path) == {"c0.mp4", "c0.json", "manifest.json"}
    monkeypatch.setattr(module, "generate", quick)
    assert Batch(rows("a", "b", "c"), tmp_path).run(silent)["count"]["done"] == 3


# --- real processes


def test_killed_at_random_moments_it_ends_with_the_same_files(tmp_path):
    prompts = written(
        tmp_path, "p.txt", "a red circle moves left\na blue square moves up\na green triangle moves down\n"
    )
    command = [sys.executable, "-m", "dit_sparse.cli", "batch", str(prompts), *SMALL, "--out", str(tmp_path / "out")]
    rng = random.Random(0)
    for kill in range(2):
        run = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while run.poll() is None and len(list(tmp_path.glob("out/[!.]*.mp4"))) <= kill:
            time.sleep(0.01)
        time.sleep(0.3 * rng.random())
        run.send_signal(signal.SIGKILL)
        run.wait()
    usual = {"method": "radial", "density": 0.25, "dense_steps": 1, "executor": "gather", "block": None}
    for out in ("out", "straight"):
        assert Batch(read_rows(prompts), tmp_path / out, usual=usual, call=CALL).run(silent)["count"]["done"] == 3
    assert files(tmp_path / "out") == files(tmp_path / "straight")
    for path in (tmp_path / "straight").glob("*.mp4"):
        assert np.array_equal(imageio.imread(path), imageio.imread(tmp_path / "out" / path.name))


def test_two_processes_share_a_batch(tmp_path):
    prompts = written(tmp_path, "p.txt", "".join(f"a red circle moves left {number}\n" for number in range(3)))
    out, port = tmp_path / "out", _free_port()
    command = [sys.executable, "-m", "dit_sparse.cli", "batch", str(prompts), *SMALL, "--out", str(out)]
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    environments = [os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    runs = [subprocess.Popen(command, env=one, stderr=subprocess.DEVNULL) for one in environments]
    assert [run.wait() for run in runs] == [0, 0]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["count"] == {"done": 3, "failed": 0, "missing": 0}
    assert len(files(out)) == 7


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
