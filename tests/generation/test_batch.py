"""The batch: prompt files good and bad, what is skipped and tried again, real kills, processes that share."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dit_sparse.bundled import BUNDLED
from dit_sparse.cli.main import app
from dit_sparse.generation import batch as module
from dit_sparse.generation.batch import Batch, Stopped
from dit_sparse.generation.generate import Clip
from dit_sparse.generation.prompts import LONGEST_PROMPT, RESERVED, Row, file_name, read_rows


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


def test_any_line_ends_and_capitals(tmp_path):
    lines = read_rows(written(tmp_path, "p.TXT", b"a cat\ra dog\r\n"))
    table = read_rows(written(tmp_path, "p.csv", b"id, prompt\rx,a cat\ry,a dog\r"))
    assert [row.prompt for _, row in lines] == [row.prompt for _, row in table] == ["a cat", "a dog"]


def test_rows_with_settings_of_their_own(tmp_path):
    table = 'id,prompt,seed,density,dense_steps\ncat,"a cat, sleeping",7,0.3,2\n,a dog,,,0.5\n'
    objects = '{"id": "cat", "prompt": "a cat, sleeping", "seed": 7, "density": 0.3, "dense_steps": 2}\n'
    objects += '{"prompt": "a dog", "dense_steps": 0.5}\n'
    first, second = (read_rows(written(tmp_path, *one)) for one in (("p.csv", table), ("p.jsonl", objects)))
    assert first == second
    assert first[0] == ("cat", Row(id="cat", prompt="a cat, sleeping", seed=7, density=0.3, dense_steps=2))
    assert first[1][0] == "0002-a_dog" and isinstance(first[0][1].dense_steps, int)


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/absolute/x",
        "..",
        "a/b\\c",
        "con\n",
        ".hidden",
        "x" * 150,
        "日本",
        "~",
        "a\0b",
        "COM1.x",
        "nul",
    ],
)
def test_names_are_safe_and_differ(name):
    safe = file_name(Row(prompt="p", id=name), 1)
    assert safe and Path(safe).name == safe and not safe.startswith((".", "-")) and len(safe) <= 100 and safe.isascii()
    assert safe != file_name(Row(prompt="p", id=name + "!"), 1) and safe.split(".")[0].lower() not in RESERVED


def test_ids_that_become_safe_stay_different():
    assert len({file_name(Row(prompt="p", id=name), 1).lower() for name in ("a b", "a/b", "a?b", "a_b", "A b")}) == 5


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("p.txt", "", "no prompts"),
        ("p.txt", "a cat\n\xff\n".encode("latin-1"), "line 2: this is not UTF-8"),
        ("p.txt", "a cat\n".encode("utf-16"), "line 1: this is not UTF-8"),
        ("p.txt", "a cat\n".encode("utf-16-le"), "line 1: a zero byte"),
        ("p.txt", "a cat\0\n", "line 1: a zero byte"),
        ("p.txt", "\ufeff\n \n", "no prompts"),
        ("p.txt", "x" * 1_000_000, f"at most {LONGEST_PROMPT} characters"),
        ("p.csv", "", "a column 'prompt'"),
        ("p.csv", "prompt\n", "no prompts"),
        ("p.csv", "text\na cat\n", "a column 'prompt'"),
        ("p.csv", "id;prompt\nx;a cat\n", "commas between columns"),
        ("p.csv", "id,prompt,id\nx,a cat,y\n", "two columns of the same name"),
        ("p.csv", "id,prompt\nx\n", "line 2: prompt"),
        ("p.csv", "prompt\na cat,2\n", "line 2: more cells"),
        ("p.csv", "prompt,seed\na cat,many\n", "line 2: seed"),
        ("p.csv", "prompt,seed\na cat,-1\n", "line 2: seed"),
        ("p.csv", "prompt,density\na cat,nan\n", "line 2: density"),
        ("p.csv", "prompt,colour\na cat,red\n", "line 2: there is no setting 'colour'"),
        ("p.csv", 'prompt\n"a cat\n', "unexpected end of data"),
        ("p.csv", f"prompt\n{'x' * 200_000}\n", "field larger than field limit"),
        ("p.jsonl", '{"prompt": "a cat"}\n{"prompt"\n', "line 2: this is no JSON"),
        ("p.jsonl", "[" * 100_000, "line 1: this is no JSON"),
        ("p.jsonl", '["a cat"]\n', 'line 1: a row is an object such as {"prompt"'),
        ("p.jsonl", '{"prompt": ["a cat"]}\n', "line 1: prompt"),
        ("p.jsonl", '{"prompt": "a", "\\u001b[2J": 1}\n', r"no setting '\x1b[2J'"),
        ("p.jsonl", '{"prompt": "a\\u0000b"}\n', "line 1: a zero byte"),
        ("p.jsonl", '{"prompt": "\\ud800"}\n', "line 1: prompt"),
        ("p.jsonl", '{"prompt": "a", "density": NaN}\n', "line 1: density"),
        ("p.jsonl", '{"prompt": "a", "guidance": 1e999}\n', "line 1: guidance"),
        ("p.jsonl", '{"prompt": "a", "frames": 1e300}\n', "line 1: frames"),
        ("p.jsonl", '{"prompt": "a", "steps": 1000000000}\n', "line 1: steps"),
        ("p.jsonl", '{"prompt": "a", "seed": true}\n', "line 1: seed cannot be true"),
        ("p.jsonl", f'{{"prompt": "a", "seed": {"9" * 5000}}}\n', "line 1"),
        ("p.jsonl", f'{{"prompt": "a", "id": "{"x" * 300}"}}\n', "line 1: id"),
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
        ({"density": 0}, "density is the fraction"),
        ({"dense_steps": -1}, "dense_steps is a count"),
        ({"id": "manifest"}, "would both be named manifest"),
    ],
)
def test_a_row_that_cannot_run_is_refused_before_any_work(tmp_path, row, words):
    path = written(tmp_path, "p.jsonl", json.dumps({"prompt": "a cat"} | row) + "\n")
    run = CliRunner().invoke(app, ["batch", str(path), "--out", str(tmp_path / "out")])
    assert run.exit_code == 2 and words in run.output.replace("\n", " "), run.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        (["--seed", "9" * 30], "a seed is"),
        (["--guidance", "nan"], "guidance_scale is a number"),
        (["--frames", "9" * 30], "num_frames is a number"),
        (["--fps", "9" * 30], "fps is a number"),
        (["--executor", "nope"], "no executor 'nope'"),
    ],
)
def test_an_option_that_cannot_work_is_refused_before_any_work(tmp_path, options, words):
    path = written(tmp_path, "p.txt", "a cat\n")
    run = CliRunner().invoke(app, ["batch", str(path), *options, "--out", str(tmp_path / "out")])
    assert run.exit_code == 2 and words in run.output.replace("\n", " "), run.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["p.txt", "p.txt/deeper", "x" * 300])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path, out):
    path = written(tmp_path, "p.txt", "a cat\n")
    run = CliRunner().invoke(app, ["batch", str(path), "--out", str(tmp_path / out)])
    assert run.exit_code == 2 and "cannot write into" in run.output, run.output
    assert files(tmp_path) == {"p.txt"}


@pytest.mark.parametrize("name", ["folder.txt", "nothing.csv"])
def test_what_is_no_file_is_refused(tmp_path, name):
    (tmp_path / "folder.txt").mkdir()
    run = CliRunner().invoke(app, ["batch", str(tmp_path / name), "--out", str(tmp_path / "out")])
    assert run.exit_code == 2 and "cannot read" in run.output and not (tmp_path / "out").exists(), run.output


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
    for draft in (".c0.123.mp4", ".c1.45.json", ".manifest.6.json"):
        written(tmp_path, draft, b"half")
    strangers = {".c0.x.123.mp4", ".hidden", ".c0.mp4"}
    for stranger in strangers:
        written(tmp_path, stranger, b"not ours")
    Batch(rows("a", "b"), tmp_path).run(silent)
    assert made == [("a", 0), ("b", 0), ("a", 0)]
    assert files(tmp_path) == {"c0.mp4", "c0.json", "c1.mp4", "c1.json", "manifest.json"} | strangers


def test_the_manifest_knows_what_another_process_ends_meanwhile(tmp_path, made, monkeypatch):
    good, told = module.save_json, {"status": "done"}

    def save_json(path, value):
        if path.name == "manifest.json":
            written(tmp_path, "c0.json", json.dumps(told))
        good(path, value)

    task = Batch(rows("a"), tmp_path)
    monkeypatch.setattr(module, "_share", lambda left: [])
    monkeypatch.setattr(module, "save_json", save_json)
    assert task.run(silent)["count"]["done"] == 1 and not made
    assert json.loads((tmp_path / "manifest.json").read_text())["count"]["done"] == 1


def test_a_video_that_does_not_fit_on_the_disk_is_not_done(tmp_path, made, monkeypatch):
    resource = pytest.importorskip("resource")
    noise = np.random.default_rng(0).integers(0, 255, (4, 96, 96, 3), np.uint8)
    monkeypatch.setattr(module, "generate", lambda *_: Clip(noise, 0.5))
    task = Batch(rows("a"), tmp_path, retries=0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        manifest = task.run(silent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "could not be written whole" in manifest["clips"][0]["error"]
    assert files(tmp_path) == {"c0.json", "manifest.json"}
    assert task.run(silent)["count"]["done"] == 1


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
        if prompt == "huge":
            torch.empty(2**58)
        if prompt == "shaky" and tries.count("shaky") < 2:
            raise RuntimeError("a hiccup\nwith details")
        if prompt == "broken":
            raise RuntimeError("never works")
        return good(pipe, prompt, *rest)

    monkeypatch.setattr(module, "generate", generate)
    manifest = Batch(rows("big", "shaky", "broken", "huge", "a"), tmp_path).run(silent)
    assert tries == ["big", "shaky", "shaky", "broken", "broken", "huge", "a"]
    assert [clip["status"] for clip in manifest["clips"]] == ["failed", "done", "failed", "failed", "done"]
    assert all("out of memory: fewer frames" in manifest["clips"][big]["error"] for big in (0, 3))
    assert "never works" in manifest["clips"][2]["error"]
    Batch(rows("big", "shaky", "broken", "huge", "a"), tmp_path).run(silent)
    assert tries[7:] == ["big", "broken", "broken", "huge"]


def test_what_failed_may_be_tried_with_other_settings(tmp_path, made, monkeypatch):
    def generate(*_):
        raise torch.OutOfMemoryError("too many frames")

    with monkeypatch.context() as patch:
        patch.setattr(module, "generate", generate)
        assert Batch(rows("a", frames=81), tmp_path).run(silent)["count"]["failed"] == 1
    assert Batch(rows("a", frames=41), tmp_path).run(silent)["count"] == {"done": 1, "failed": 0, "missing": 0}


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


def test_a_signal_after_the_last_step_ends_it_before_the_next_clip(tmp_path, made, monkeypatch):
    quick, stages = module.generate, []

    def generate(*given):
        clip = quick(*given)
        os.kill(os.getpid(), signal.SIGINT)
        return clip

    monkeypatch.setattr(module, "generate", generate)
    with pytest.raises(Stopped):
        Batch(rows("a", "b"), tmp_path).run(lambda name: stages.append(name) or silent(name))
    assert made == [("a", 0)] and files(tmp_path) == {"c0.mp4", "c0.json", "manifest.json"}
    assert stages == ["clips", "stopping"]
    written(tmp_path, "p.txt", "a\nb\n")
    run = CliRunner().invoke(app, ["batch", str(tmp_path / "p.txt"), "--out", str(tmp_path / "out")])
    assert run.exit_code == 130 and run.output.endswith("stopped; the same command goes on from here\n"), run.output


# --- real processes: forks of this one, which has loaded the model


CLIPS = 5
CALL = {"num_inference_steps": 2, "num_frames": 2, "height": 32, "width": 32, "guidance_scale": 1.0}
USUAL = {"method": "radial", "density": 0.25, "dense_steps": 1}
USUAL |= {"executor": "gather"}  # "auto" goes by what it measures, and clips are compared


@pytest.fixture(scope="module")
def model():
    if not hasattr(os, "fork"):
        pytest.skip("there is no fork here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)  # CUDA does not survive a fork
        pipe = module.load(BUNDLED)
        patch.setattr(module, "load", lambda name: pipe)
        yield


@pytest.fixture(scope="module")
def straight(model, tmp_path_factory) -> Path:
    """The folder of a batch that nobody disturbed; beside it, how many moments it had."""
    out = tmp_path_factory.mktemp("batch") / "straight"
    assert ended(forked(watched, out)) == 0
    return out


def real(out: Path) -> Batch:
    prompts = [f"a red circle moves {way}" for way in ("left", "right", "up", "down", "left")]
    return Batch(rows(*prompts), out, usual=USUAL, call=CALL, seed=3)


def watched(out: Path, kill_at: int = 0, kind: str = "all") -> None:
    """Run it. A moment is a call or a return; it dies at one of all of them, or of those while a draft is there."""
    seen = {"all": 0, "drafts": 0}

    def see(frame, event, arg):
        seen["all"] += 1
        seen["drafts"] += writes(frame) and any(name.startswith(".") for name in os.listdir(out))
        if seen[kind] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(see)
    real(out).run(silent)
    sys.setprofile(None)
    written(out.parent, "moments.json", json.dumps(seen))


def writes(frame) -> bool:
    """Whether it is part of writing a video or a JSON file, and no loop that waits for the encoder."""
    if not any(part in frame.f_code.co_filename for part in ("imageio/", "pathlib")):
        return False
    while frame and frame.f_code.co_name not in ("save_video", "save_json"):
        frame = frame.f_back
    return frame is not None


def forked(work: Callable, *given) -> int:
    """The id of a process that does this work."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        torch.set_num_threads(1)  # threads do not survive a fork either
        work(*given)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(process: int) -> int:
    """Its exit code; of a process that was killed the negative signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def videos(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*.mp4")}


def test_killed_at_ten_random_moments_it_ends_with_the_same_files(straight, tmp_path):
    out, done = tmp_path / "out", set()
    moments = json.loads((straight.parent / "moments.json").read_text())
    rng = random.Random(81)
    for kill in range(10):
        kind = ("drafts", "all")[kill % 2]
        moment = 1 + int(1.5 * rng.random() * moments[kind] / CLIPS)
        assert ended(forked(watched, out, moment, kind)) == -signal.SIGKILL
        assert videos(out).items() <= videos(straight).items()  # none half-written
        before, done = done, {path.name for path in out.glob("[!.]*.json")}
        assert before <= done  # none lost
    assert ended(forked(watched, out)) == 0
    assert files(out) == files(straight) and len(files(out)) == 2 * CLIPS + 1
    assert videos(out) == videos(straight)
    assert json.loads((out / "manifest.json").read_text())["count"] == {"done": CLIPS, "failed": 0, "missing": 0}


def member(out: Path, rank: int, port: int, dies: bool) -> None:
    """One of two processes that share a batch and note what they begin; it may die in its second clip."""
    where = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ.update(where, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    good, begun = module.generate, []

    def generate(pipe, prompt, seed, call, progress):
        begun.append(prompt)
        with (out.parent / "begun").open("a") as file:
            file.write(f"{rank} {prompt}\n")
        if dies and len(begun) == 2:
            progress = lambda step, steps: os.kill(os.getpid(), signal.SIGKILL)
        return good(pipe, prompt, seed, call, progress)

    module.generate = generate
    real(out).run(silent)


def shared(out: Path, victim: int | None = None) -> tuple[list[int], list[str]]:
    """Exit codes of two processes that share a batch, and what was begun, with who began it."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    (out.parent / "begun").write_text("")
    processes = [forked(member, out, rank, port, rank == victim) for rank in range(2)]
    return [ended(process) for process in processes], (out.parent / "begun").read_text().splitlines()


def test_two_processes_make_every_row_once(straight, tmp_path):
    codes, begun = shared(tmp_path / "out")
    assert codes == [0, 0] and len(begun) == CLIPS
    assert files(tmp_path / "out") == files(straight) and videos(tmp_path / "out") == videos(straight)
    assert Counter(line[0] for line in begun) == {"0": 3, "1": 2}


@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_processes_dies_and_the_next_start_does_the_rest(straight, tmp_path, victim):
    out = tmp_path / "out"
    codes, _ = shared(out, victim)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 0
    whole = videos(out)
    assert len(whole) == (3, 4)[victim] and whole.items() <= videos(straight).items()
    codes, begun = shared(out)
    assert codes == [0, 0] and len(begun) == CLIPS - len(whole)
    assert files(out) == files(straight) and videos(out) == videos(straight)
