"""Everything that wants a GPU, in one command: ``python -m dit_sparse.eval.gpu --out DIR [--minutes 25]``.

The kernel tests on the device, both benches, the training of shapes-wan, and a comparison of all methods on what was
trained: each in a process of its own, under a time limit of its own. What has ended well is not run again by a later
call into the same folder with the same sources, and training and comparison go on where they were: a machine that is
there for some minutes at a time will do. Results are JSON files in the folder; the last lines printed say how every
stage stands.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .environment import conditions, sources
from .files import save_json, writable_folder

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("test_triton.py", "test_executors.py", "test_third_party.py", "test_cluster.py", "test_selection.py")
GRACE = 30  # seconds between asking a stage to end and ending it: training saves and exports meanwhile
LEAST = 20  # seconds; with less left, nothing is begun


@dataclass(frozen=True)
class Stage:
    """One process: what it runs, and the minutes after which it is asked to end."""

    name: str
    command: Sequence[str]
    minutes: float


@dataclass(frozen=True)
class Standing:
    """How a stage stands: ``done``, ``failed``, ``stopped`` at its limit, or ``not begun``; and of which `sources`."""

    name: str
    state: str
    seconds: float
    sources: str


def stages(out: Path, training_minutes: float) -> list[Stage]:
    """All of it, in order. The comparison takes the trained model, at the size of the demo."""
    python = lambda module, *rest: (sys.executable, "-m", module, *map(str, rest))
    bench = lambda name: python("dit_sparse.cli", "bench", name, "--out", out / f"{name}.json")
    budget = ("--minutes", training_minutes, "--resume", "--light")
    trained = ("--model", out / "shapes/shapes-wan", "--steps", 16, "--frames", 20, "--height", 80, "--width", 80)
    wanted = ("--methods", "all", "--density", "0.15,0.25,0.4", "--prompts", 8)
    return [
        Stage("tests", python("pytest", "-q", *(ROOT / "tests" / name for name in TESTS)), 6),
        Stage("attention", bench("attention"), 9),
        Stage("transformer", bench("transformer"), 9),
        Stage("training", python("dit_sparse.shapes.train", "--device", "cuda", *budget, "--out", out / "shapes"), 8),
        Stage("compare", python("dit_sparse.cli", "compare", *wanted, *trained, "--out", out / "compare"), 9),
    ]


def run(todo: Sequence[Stage], out: Path, minutes: float) -> list[Standing]:
    """Run what is not done yet, for so many minutes in all. ``gpu.json`` in ``out`` says after each stage how all
    stand."""
    end, standing = time.monotonic() + 60 * minutes, _done(out)
    for stage in (stage for stage in todo if stage.name not in standing):
        if (left := end - time.monotonic()) < LEAST:
            standing[stage.name] = Standing(stage.name, "not begun", 0.0, sources())
        else:
            print(f"{stage.name}: at most {min(stage.minutes, left / 60):.1f} minutes", flush=True)
            standing[stage.name] = _run(stage, out / f"{stage.name}.log", left - GRACE / 2)
        save_json(out / "gpu.json", {"stages": [asdict(one) for one in standing.values()]} | conditions())
    return [standing[stage.name] for stage in todo]


def _done(out: Path) -> dict[str, Standing]:
    """What earlier calls into this folder have finished, with these sources."""
    try:
        found = [Standing(**stage) for stage in json.loads((out / "gpu.json").read_text())["stages"]]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {one.name: one for one in found if one.state == "done" and one.sources == sources()}


def _run(stage: Stage, log: Path, seconds: float) -> Standing:
    """One stage; what it prints goes to its log, and no process of it outlives it."""
    began, stopped = time.monotonic(), False
    with log.open("w") as file:
        process = subprocess.Popen(stage.command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
    try:
        process.wait(min(60 * stage.minutes, seconds))
    except subprocess.TimeoutExpired:
        stopped = True
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    state = "stopped" if stopped else "failed" if process.returncode else "done"
    return Standing(stage.name, state, time.monotonic() - began, sources())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--minutes", type=float, default=60.0, help="for this call, all stages together")
    parser.add_argument("--training-minutes", type=float, default=22.0, help="of all calls together")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "there is no NVIDIA GPU here that torch can use: nothing was run\n")
    try:
        out = writable_folder(options.out.resolve())
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    found = run(stages(out, options.training_minutes), out, options.minutes)
    for one in found:
        print(f"{one.name:12} {one.state:10} {one.seconds / 60:5.1f} min")
    sys.exit(any(one.state == "failed" for one in found))


if __name__ == "__main__":
    main()
