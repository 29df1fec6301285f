"""Batches on a local Ray cluster: workers that are killed, slow tasks, failures, and the files of a batch."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from batches import batch_of_any_prompts, file_names, make_rows, silent_stage, write_file
from dit_sparse import Schedule
from dit_sparse.cli.main import app
from dit_sparse.eval.comparison.comparison import Comparison
from dit_sparse.eval.comparison.ray_runner import runner_class
from dit_sparse.eval.comparison.runner import ClipRunner
from dit_sparse.generation import ray_batch
from dit_sparse.generation.batch import Batch, Interrupted, Job
from dit_sparse.generation.ray_batch import BatchWorker, run_batch
from dit_sparse.generation.ray_pool import MAX_DEATHS, RayPool, check_engine
from dit_sparse.output.environment import device_name

ray = pytest.importorskip("ray")

CALL = {"num_inference_steps": 2, "num_frames": 2, "height": 32, "width": 32, "guidance_scale": 1.0}
SETTINGS = {"method": "radial", "density": 0.25, "dense_steps": 1, "executor": "gather"}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One cluster for the file; its workers get the classes of this file by value, because they cannot import it."""
    check_engine("ray")  # sets the environment of Ray
    os.environ.setdefault("RAY_agent_register_timeout_ms", "300000")  # on a busy machine
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "300")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    options = {"num_cpus": 2, "object_store_memory": 80 * 2**20, "include_dashboard": False, "log_to_driver": False}
    ray.init(address="local", logging_level="error", **options)
    yield
    ray.shutdown()


@pytest.fixture
def one_thread():
    """As in the workers, whose device is named with the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Worker:
    """Appends the name of a task to a file, and does what the name asks for."""

    def __init__(self, folder: Path, broken: bool = False) -> None:
        if broken:
            raise ValueError("there is no such model")
        self.folder = folder

    def describe(self) -> dict:
        return {"host": "here", "process": os.getpid()}

    def run(self, task: str) -> str:
        with (self.folder / "runs").open("a") as file:
            file.write(f"{task}\n")
        times = (self.folder / "runs").read_text().splitlines().count(task)
        if task == "deadly" or (task == "killed" and times == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if task == "raises":
            raise RuntimeError("a reason")
        while task == "slow" and not {*"abcdef"} <= {*(self.folder / "runs").read_text().splitlines()}:
            time.sleep(0.05)
        return task.upper()


def run_pool(folder: Path, tasks: list[str], workers: int = 2, **options) -> tuple[list, dict]:
    """Return the results in the order of their end, and the reasons of failures by task."""
    results, failures = [], {}
    pool = RayPool(partial(Worker, folder, **options), workers)
    try:
        on_failure = lambda number, reason: failures.update({tasks[number]: reason})
        pool.run(tasks, lambda number, result: results.append(result), on_failure)
        assert pool.run([], None, None) is None
    finally:
        pool.close()
    return results, failures


@pytest.mark.slow
def test_every_task_runs_once_although_workers_die_and_tasks_fail_or_are_slow(tmp_path):
    """The slow task ends after the others, so that it would wait forever if it held them."""
    tasks = ["slow", "killed", *"abcdef", "raises", "deadly"]
    results, failures = run_pool(tmp_path, tasks)
    assert sorted(results) == sorted(["SLOW", "KILLED", *"ABCDEF"])
    assert set(failures) == {"raises", "deadly"} and failures["raises"] == "RuntimeError: a reason"
    assert failures["deadly"].startswith(f"the worker died {MAX_DEATHS} times")
    runs = (tmp_path / "runs").read_text().splitlines()
    assert {task: runs.count(task) for task in tasks} == {task: 1 for task in tasks} | {
        "killed": 2,
        "deadly": MAX_DEATHS,
    }


def test_workers_that_cannot_load_end_the_run_with_their_reason(tmp_path):
    with pytest.raises(ValueError, match="there is no such model"):
        run_pool(tmp_path, ["a"], workers=1, broken=True)
    with pytest.raises(ValueError, match="workers must be at least 1"):
        RayPool(Worker, 0)


def test_workers_that_differ_from_the_first_are_left_out(tmp_path, caplog):
    pool, results = RayPool(partial(Worker, tmp_path), 2, same=("process",)), []
    try:
        first = pool.wait_for_first()["process"]
        pool.run("abcdef", lambda number, result: results.append(result), None)
        while "left out" not in caplog.text:
            pool.run("g", lambda number, result: None, None)
    finally:
        pool.close()
    assert sorted(results) == [*"ABCDEF"]
    assert f"a worker on here has another process: {pool.described['process']}" not in caplog.text
    assert f", not {first}" in caplog.text


def kill_first_worker(out: Path, killed: list[int]) -> None:
    """Kill the process that announces the first clip in its lock file."""
    while not killed:
        for path in out.glob(".c*.lock"):
            try:
                process = json.loads(path.read_text())["process"]
            except (OSError, ValueError):
                continue
            os.kill(process, signal.SIGKILL)
            killed.append(process)
            return
        time.sleep(0.002)


@pytest.mark.slow
def test_a_batch_whose_worker_is_killed_has_the_files_of_a_local_batch(tmp_path, one_thread):
    prompts = [f"a red circle moves {way}" for way in ("left", "right", "up", "down")]
    make = lambda name: Batch(make_rows(*prompts), tmp_path / name, settings=SETTINGS, call=CALL, seed=3)
    local = make("local").run(silent_stage)
    task, killed, progress = make("ray"), [], []
    killer = threading.Thread(target=kill_first_worker, args=(task.out, killed), daemon=True)
    killer.start()
    manifest = run_batch(task, lambda name: lambda *numbers: progress.append(numbers), workers=2)
    assert killed and manifest["count"] == {"done": 4, "failed": 0, "missing": 0}
    assert file_names(task.out) == file_names(tmp_path / "local")
    assert progress == [(number, 4) for number in range(5)]
    for clip, expected in zip(manifest["clips"], local["clips"], strict=True):
        assert clip["asked"] == expected["asked"] and clip.keys() == expected.keys()
        assert clip["video_sha256"] == expected["video_sha256"]
        assert clip["start"] < clip["end"] and clip["peak_memory"] > 0 and clip["host"]
        assert clip["process"] not in killed
    assert json.loads((task.out / "manifest.json").read_text()) == manifest
    assert run_batch(task, silent_stage, workers=2) == manifest, "all clips are done: no worker is started"


def measured(result: dict) -> list[tuple]:
    """What a comparison measures besides times."""
    names = ("name", "psnr", "ssim", "density_achieved", "retained", "latent_error", "error", "settings")
    return [tuple(row[name] for name in names) for row in result["rows"] if not row["name"].startswith("dense, ")]


@pytest.mark.slow
def test_a_comparison_has_the_rows_of_a_local_one_and_its_clips_are_stored(tmp_path, one_thread, monkeypatch):
    call = {"num_inference_steps": 2, "num_frames": 2, "height": 32, "width": 32}
    options = {"densities": (0.4,), "block": 16, "call": call, "schedule": Schedule(1), "executor": "gather"}
    make = lambda name: Comparison(
        ["radial"], ["a red circle moves up", "a blue square moves up"], tmp_path / name, **options
    )
    progress = []
    stage = lambda name: lambda *numbers: progress.append((name, *numbers))
    result = make("ray").run(stage, runner_class("ray", 2))
    assert ("rows (clips)", 6, 6) in progress and result["finished"] and not result["failures"]
    assert result["device"] == device_name()
    assert measured(result) == measured(make("local").run(silent_stage))
    monkeypatch.setattr(ClipRunner, "pipe", None)  # fails if a clip is missing
    again = make("ray").run(silent_stage)
    assert again["rows"] == result["rows"]
    assert {path.suffix for path in (tmp_path / "ray" / "clips").iterdir()} == {".npz"}


class StuckWorker(Worker):
    """Sends SIGINT to the process that started the batch, and never finishes."""

    def __init__(self, batch: Batch, token: str) -> None:
        self.batch = batch

    def run(self, job: Job) -> None:
        os.kill(int(job.prompt), signal.SIGINT)
        time.sleep(600)


def test_a_signal_ends_the_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_batch, "BatchWorker", StuckWorker)
    with pytest.raises(Interrupted):
        run_batch(batch_of_any_prompts(make_rows(str(os.getpid())), tmp_path), silent_stage, workers=1)
    assert json.loads((tmp_path / "manifest.json").read_text())["count"] == {"done": 0, "failed": 0, "missing": 1}
    assert file_names(tmp_path) == {"manifest.json"}


def test_the_folder_must_be_shared(tmp_path):
    with pytest.raises(ValueError, match="choose an --out that all machines share"):
        BatchWorker(batch_of_any_prompts(make_rows("a"), tmp_path), "absent")


def test_engines_are_checked_before_any_work(tmp_path, monkeypatch):
    prompts = str(write_file(tmp_path, "p.txt", "a\n"))
    refuse = lambda *options: CliRunner().invoke(app, ["batch", prompts, "--out", str(tmp_path / "out"), *options])
    assert "--engine must be local or ray, got 'spark'" in refuse("--engine", "spark").output
    assert "--workers is the number of processes of --engine ray" in refuse("--workers", "2").output
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without accelerate launch" in refuse("--engine", "ray").output
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setitem(sys.modules, "ray", None)
    run = refuse("--engine", "ray")
    assert run.exit_code == 2 and run.output.strip() == (
        "dit-sparse: --engine ray needs Ray: pip install 'dit-sparse[ray]'"
    )
    assert not (tmp_path / "out").exists()
    check_engine("local")
