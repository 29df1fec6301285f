"""The command for a machine with a GPU: its stages, limits and memory, with stages that need none."""

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
from dit_sparse.eval.bench import gpu_suite as gpu
from dit_sparse.eval.bench.gpu_suite import Stage


def python(name: str, code: str, minutes: float = 1.0) -> Stage:
    return Stage(name, (sys.executable, "-c", code), minutes)


def states(standings) -> dict[str, str]:
    return {one.name: one.state for one in standings}


def has_ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except FileNotFoundError:
        return True


def test_a_stage_that_fails_stops_no_other(tmp_path):
    todo = [python("bad", "print('told'); raise SystemExit(3)"), python("good", "")]
    found = gpu.run(todo, tmp_path, 1.0)
    assert states(found) == {"bad": "failed", "good": "done"}
    assert (tmp_path / "bad.log").read_text() == "told\n"
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert states(gpu.StageStatus(**one) for one in stored["stages"]) == states(found) and stored["device"]


def test_what_is_done_is_not_run_again_but_with_other_sources(tmp_path, monkeypatch):
    mark = tmp_path / "marks"
    todo = [python("one", f"open({str(mark)!r}, 'a').write('.')"), python("two", "raise SystemExit(1)")]
    for _ in range(2):
        assert states(gpu.run(todo, tmp_path, 1.0)) == {"one": "done", "two": "failed"}
    assert mark.read_text() == "."
    monkeypatch.setattr(gpu, "decided", lambda: "something else")
    gpu.run(todo, tmp_path, 1.0)
    assert mark.read_text() == ".."
    (tmp_path / "gpu.json").write_text("{")
    gpu.run(todo, tmp_path, 1.0)
    assert mark.read_text() == "..."


def test_at_its_limit_a_stage_is_asked_to_end_and_leaves_no_process(tmp_path, monkeypatch):
    """One that saves when it is asked, one that does not listen and has a child of its own."""
    monkeypatch.setattr(gpu, "GRACE", 3.0)
    listens = "import signal, sys, time; signal.signal(15, lambda *_: (print('saved'), sys.exit())); time.sleep(60)"
    child = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    deaf = f"import signal, sys, time; signal.signal(15, lambda *_: None); {child}; sys.stdout.flush(); time.sleep(60)"
    found = gpu.run([python("listens", listens, 0.04), python("deaf", deaf, 0.04)], tmp_path, 1.0)
    assert states(found) == {"listens": "stopped", "deaf": "stopped"}
    assert (tmp_path / "listens.log").read_text() == "saved\n"
    assert has_ended(int((tmp_path / "deaf.log").read_text()))


def test_when_the_time_is_over_nothing_is_begun(tmp_path):
    began = time.monotonic()
    assert states(gpu.run([python("one", "")], tmp_path, 0.1)) == {"one": "not begun"}
    assert time.monotonic() - began < 30 and not (tmp_path / "one.log").exists()
    assert states(gpu.run([python("one", "")], tmp_path, 1.0)) == {"one": "done"}


def test_what_was_never_tried_comes_first_and_nothing_before_what_it_needs(tmp_path, monkeypatch):
    mark, bad = tmp_path / "marks", tmp_path / "bad"
    note = lambda name: f"open({str(mark)!r}, 'a').write({name!r})"
    bad.touch()
    todo = [
        python("a", f"{note('a')}; import os; raise SystemExit(os.path.exists({str(bad)!r}))"),
        Stage("b", python("", note("b")).command, 1.0, after="a"),
        python("c", note("c")),
    ]
    assert states(gpu.run(todo[:2], tmp_path, 1.0)) == {"a": "failed", "b": "not begun"}
    assert states(gpu.run(todo, tmp_path, 1.0)) == {"a": "failed", "b": "not begun", "c": "done"}
    assert mark.read_text() == "aca"
    bad.unlink()
    assert set(states(gpu.run(todo, tmp_path, 1.0)).values()) == {"done"} and mark.read_text() == "acaab"


def test_every_stage_names_what_is_there(tmp_path):
    """What is misspelt would cost a machine its minutes."""
    todo = {stage.name: list(stage.command[2:]) for stage in gpu.stages(tmp_path, 22)}
    assert list(todo) == ["tests", "attention", "transformer", "tilings", "training", "compare"]
    on_a_gpu = {
        path.relative_to(gpu.ROOT / "tests").as_posix()
        for path in (gpu.ROOT / "tests").rglob("test_*.py")
        if '\nDEVICE = "cuda"' in path.read_text()
    }
    assert set(gpu.TESTS) == on_a_gpu
    for name in ("attention", "transformer", "compare"):
        module, *arguments = todo[name]
        assert module == "dit_sparse.cli"
        command = typer.main.get_command(cli.app)
        while hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        command.make_context(name, arguments)  # refuses an option that it does not know
    for name in ("tilings", "training"):
        module, *arguments = todo[name]
        known = Path(importlib.util.find_spec(module).origin).read_text()
        assert all(f'"{option}"' in known for option in arguments if option.startswith("--"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2 and "there is no NVIDIA GPU here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
