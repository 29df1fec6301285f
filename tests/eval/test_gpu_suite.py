"""The GPU suite: stages, time limits and resuming, with stages that need no GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch
import typer.main

from dit_sparse.cli import main as cli
from dit_sparse.eval.bench import gpu_suite
from dit_sparse.eval.bench.gpu_suite import Stage, StageStatus


def python(name: str, code: str, minutes: float = 1.0) -> Stage:
    return Stage(name, (sys.executable, "-c", code), minutes)


def states(status) -> dict[str, str]:
    return {one.name: one.state for one in status}


def has_ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except FileNotFoundError:
        return True


def test_a_failing_stage_does_not_stop_the_others(tmp_path):
    todo = [python("bad", "print('output'); raise SystemExit(3)"), python("good", "")]
    status = gpu_suite.run(todo, tmp_path, 1.0)
    assert states(status) == {"bad": "failed", "good": "done"}
    assert (tmp_path / "bad.log").read_text() == "output\n"
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert states(StageStatus(**one) for one in stored["stages"]) == states(status) and stored["device"]


def test_done_stages_run_again_only_after_changes(tmp_path, monkeypatch):
    log = tmp_path / "runs"
    todo = [python("one", f"open({str(log)!r}, 'a').write('.')"), python("two", "raise SystemExit(1)")]
    for _ in range(2):
        assert states(gpu_suite.run(todo, tmp_path, 1.0)) == {"one": "done", "two": "failed"}
    assert log.read_text() == "."
    monkeypatch.setattr(gpu_suite, "suite_fingerprint", lambda: "changed")
    gpu_suite.run(todo, tmp_path, 1.0)
    assert log.read_text() == ".."
    (tmp_path / "gpu.json").write_text("{")
    gpu_suite.run(todo, tmp_path, 1.0)
    assert log.read_text() == "..."


def test_stages_are_ended_at_their_time_limit(tmp_path, monkeypatch):
    """A stage may save after SIGTERM; one that ignores it is killed, with its child process."""
    monkeypatch.setattr(gpu_suite, "GRACE_SECONDS", 3.0)
    saves = "import signal, sys, time; signal.signal(15, lambda *_: (print('saved'), sys.exit())); time.sleep(60)"
    child = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    deaf = f"import signal, sys, time; signal.signal(15, lambda *_: None); {child}; sys.stdout.flush(); time.sleep(60)"
    status = gpu_suite.run([python("saves", saves, 0.04), python("deaf", deaf, 0.04)], tmp_path, 1.0)
    assert states(status) == {"saves": "stopped", "deaf": "stopped"}
    assert (tmp_path / "saves.log").read_text() == "saved\n"
    assert has_ended(int((tmp_path / "deaf.log").read_text()))


def test_no_stage_starts_without_time(tmp_path):
    begin = time.monotonic()
    assert states(gpu_suite.run([python("one", "")], tmp_path, 0.1)) == {"one": "not started"}
    assert time.monotonic() - begin < 30 and not (tmp_path / "one.log").exists()
    assert states(gpu_suite.run([python("one", "")], tmp_path, 1.0)) == {"one": "done"}


def test_unstarted_stages_come_first_and_dependencies_hold(tmp_path):
    log, bad = tmp_path / "runs", tmp_path / "bad"
    write = lambda name: f"open({str(log)!r}, 'a').write({name!r})"
    bad.touch()
    todo = [
        python("a", f"{write('a')}; import os; raise SystemExit(os.path.exists({str(bad)!r}))"),
        Stage("b", python("", write("b")).command, 1.0, after="a"),
        python("c", write("c")),
    ]
    assert states(gpu_suite.run(todo[:2], tmp_path, 1.0)) == {"a": "failed", "b": "not started"}
    assert states(gpu_suite.run(todo, tmp_path, 1.0)) == {"a": "failed", "b": "not started", "c": "done"}
    assert log.read_text() == "aca"
    bad.unlink()
    assert set(states(gpu_suite.run(todo, tmp_path, 1.0)).values()) == {"done"} and log.read_text() == "acaab"


def test_commands_of_the_stages_are_valid(tmp_path):
    todo = {stage.name: list(stage.command[2:]) for stage in gpu_suite.stages(tmp_path, 22)}
    assert list(todo) == ["tests", "attention", "tail", "transformer", "tilings", "training", "compare"]
    device_tests = {
        path.relative_to(gpu_suite.ROOT / "tests").as_posix()
        for path in (gpu_suite.ROOT / "tests").rglob("test_*.py")
        if '\nDEVICE = "cuda"' in path.read_text()
    }
    assert set(gpu_suite.TESTS) == device_tests
    for name in ("attention", "tail", "transformer", "compare"):
        module, *arguments = todo[name]
        assert module == "dit_sparse.cli"
        command = typer.main.get_command(cli.app)
        while hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        command.make_context(name, arguments)  # refuses unknown options
    for name in ("tilings", "training"):
        module, *arguments = todo[name]
        source = Path(importlib.util.find_spec(module).origin).read_text()
        assert all(f'"{option}"' in source for option in arguments if option.startswith("--"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nothing_runs_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as exit_info:
        gpu_suite.main()
    assert exit_info.value.code == 2 and "requires an NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
