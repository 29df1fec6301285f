"""Batches in real_batch processes, forks of this one: killed at any event, and run_two by two."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed

from batches import file_names, make_rows, silent_stage, write_file
from dit_sparse.bundled import BUNDLED
from dit_sparse.generation import batch as module
from dit_sparse.generation.batch import Batch
from dit_sparse.generation.processes import file_lock

CLIPS = 5
CALL = {"num_inference_steps": 2, "num_frames": 2, "height": 32, "width": 32, "guidance_scale": 1.0}
SETTINGS = {"method": "radial", "density": 0.25, "dense_steps": 1}
SETTINGS |= {"executor": "gather"}  # "auto" depends on measured times, and the clips are compared


@pytest.fixture(scope="module")
def model():
    if not hasattr(os, "fork"):
        pytest.skip("there is no fork here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)  # CUDA does not survive a fork
        pipe = module.load_pipeline(BUNDLED)
        patch.setattr(module, "load_pipeline", lambda name, options: pipe)
        yield


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory) -> Path:
    """Folder of a batch that ran to its end; ``events.json`` next to it holds its number of events."""
    out = tmp_path_factory.mktemp("batch") / "uninterrupted"
    assert exit_code(fork(run_and_count, out)) == 0
    return out


def real_batch(out: Path) -> Batch:
    prompts = [f"a red circle moves {way}" for way in ("left", "right", "up", "down", "left")]
    return Batch(make_rows(*prompts), out, settings=SETTINGS, call=CALL, seed=3)


def run_and_count(out: Path, kill_at: int = 0, kind: str = "all") -> None:
    """Run the batch and count events: calls and returns, all or those while a partial file exists. Kill it at one."""
    counts = {"all": 0, "partial": 0}

    def count(frame, event, arg):
        counts["all"] += 1
        counts["partial"] += writes(frame) and any(name.startswith(".") for name in os.listdir(out))
        if counts[kind] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    real_batch(out).run(silent_stage)
    sys.setprofile(None)
    write_file(out.parent, "events.json", json.dumps(counts))


def writes(frame) -> bool:
    """Whether a frame writes a video or a JSON file, and is not the loop that waits for the encoder."""
    if not any(part in frame.f_code.co_filename for part in ("imageio/", "pathlib")):
        return False
    while frame and frame.f_code.co_name not in ("save_video", "save_json"):
        frame = frame.f_back
    return frame is not None


def fork(work: Callable, *given) -> int:
    """Call ``work`` in a forked process and return its id."""
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


def exit_code(process: int) -> int:
    """Wait for a process. Returns its exit code, or the negative signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def videos(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*.mp4")}


def test_a_batch_killed_ten_times_ends_with_the_same_files(uninterrupted, tmp_path):
    out, done = tmp_path / "out", set()
    events = json.loads((uninterrupted.parent / "events.json").read_text())
    rng = random.Random(81)
    for kill in range(10):
        kind = ("partial", "all")[kill % 2]
        event = 1 + int(1.5 * rng.random() * events[kind] / CLIPS)
        code = exit_code(fork(run_and_count, out, event, kind))  # 0: it ended before, as numbers of events differ
        assert code in (-signal.SIGKILL, 0)
        assert videos(out).items() <= videos(uninterrupted).items()  # none half-written
        before, done = done, {path.name for path in out.glob("[!.]*.json")}
        assert before <= done  # none lost
        if code == 0:  # leave something to do
            (out / "c2.json").unlink()
            done.discard("c2.json")
    assert exit_code(fork(run_and_count, out)) == 0
    assert file_names(out) == file_names(uninterrupted) and len(file_names(out)) == 2 * CLIPS + 1
    assert videos(out) == videos(uninterrupted)
    assert json.loads((out / "manifest.json").read_text())["count"] == {"done": CLIPS, "failed": 0, "missing": 0}


def run_member(out: Path, rank: int, port: int | None, dies: bool) -> None:
    """Run one of two processes that share a batch, record the clips it starts, and kill it in its second one or not.
    Without a port, they are not of one launch."""
    if port:
        where = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        os.environ.update(where, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    original, started = module.generate, []

    def generate(pipe, prompt, seed, call, progress):
        started.append(prompt)
        with (out.parent / "started").open("a") as file:
            file.write(f"{rank} {prompt}\n")
        if dies and len(started) == 2:
            progress = lambda step, steps: os.kill(os.getpid(), signal.SIGKILL)
        return original(pipe, prompt, seed, call, progress)

    module.generate = generate
    real_batch(out).run(silent_stage)


def run_two(out: Path, victim: int | None = None, one_launch: bool = True) -> tuple[list[int], list[str]]:
    """Run two processes that share a batch. Returns their exit codes, and rank and prompt of the clips they started.

    This process holds the store, as the agent of `accelerate launch` does, so that no other program can take its port.
    """
    (out.parent / "started").write_text("")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if one_launch else None
    processes = [fork(run_member, out, rank, store and store.port, rank == victim) for rank in range(2)]
    return [exit_code(process) for process in processes], (out.parent / "started").read_text().splitlines()


def test_two_batches_in_one_folder_share_the_clips(uninterrupted, tmp_path):
    out = tmp_path / "out"
    codes, started = run_two(out, one_launch=False)
    assert codes == [0, 0] and len(started) == CLIPS
    codes, started = run_two(out, one_launch=False)
    assert codes == [0, 0] and not started
    assert file_names(out) == file_names(uninterrupted) and videos(out) == videos(uninterrupted)


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    def hold() -> None:
        with file_lock(tmp_path / "lock") as acquired:
            assert acquired
            os.kill(os.getpid(), signal.SIGKILL)

    assert exit_code(fork(hold)) == -signal.SIGKILL and (tmp_path / "lock").exists()
    with file_lock(tmp_path / "lock") as acquired, file_lock(tmp_path / "lock") as twice:
        assert acquired and not twice
    assert not file_names(tmp_path)


def test_two_processes_generate_every_row_once(uninterrupted, tmp_path):
    codes, started = run_two(tmp_path / "out")
    assert codes == [0, 0] and len(started) == CLIPS
    assert file_names(tmp_path / "out") == file_names(uninterrupted) and videos(tmp_path / "out") == videos(
        uninterrupted
    )
    assert Counter(line[0] for line in started) == {"0": 3, "1": 2}


@pytest.mark.parametrize("victim", [0, 1])
def test_the_next_start_generates_the_clips_of_a_killed_process(uninterrupted, tmp_path, victim):
    out = tmp_path / "out"
    codes, _ = run_two(out, victim)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 0
    whole = videos(out)
    assert len(whole) == (3, 4)[victim] and whole.items() <= videos(uninterrupted).items()
    codes, started = run_two(out)
    assert codes == [0, 0] and len(started) == CLIPS - len(whole)
    assert file_names(out) == file_names(uninterrupted) and videos(out) == videos(uninterrupted)
