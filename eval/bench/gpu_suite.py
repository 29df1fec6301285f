"""Everything that wants a GPU, in one command: ``python -m dit_sparse.eval.bench.gpu_suite --out DIR [--minutes 25]``.

The kernel tests on the device, both benches, launch settings beside their neighbours, the training of shapes-wan, and a
comparison of all methods on what it became: each in a process of its own, under a time limit of its own. A later call
into the same folder runs what is not done yet, what was never tried first; training and comparison go on where they
were. Other files, versions or another device begin anew. Results are JSON files in the folder; the last lines printed
say how every stage stands.
"""

from __future__ import annotations

import argparse
import hashlib
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

from dit_sparse.output.environment import conditions, device_name, sources, versions
from dit_sparse.output.files import save_json, writable_folder

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    "kernels/test_triton.py",
    "kernels/test_cluster_plans.py",
    "kernels/test_kmeans.py",
    "kernels/test_selection.py",
    "eval/test_bench.py",
)
TRIED = ("not begun", "stopped", "failed")  # in this order a later call takes up what is left
GRACE = 30  # seconds between asking a stage to end and ending it: training saves and exports meanwhile
LEAST = 20  # seconds; with less left, nothing is begun


@dataclass(frozen=True)
class Stage:
    """One process: what it runs, the minutes after which it is asked to end, and the stage that has to be done before
    it begins."""

    name: str
    command: Sequence[str]
    minutes: float
    after: str | None = None


@dataclass(frozen=True)
class StageStatus:
    """How a stage stands: ``done``, ``failed``, ``stopped`` at its limit, or ``not begun``."""

    name: str
    state: str = "not begun"
    seconds: float = 0.0


def stages(out: Path, training_minutes: float) -> list[Stage]:
    """All of it, in order. The comparison takes the trained model, at the size of the demo."""
    python = lambda module, *rest: (sys.executable, "-m", module, *map(str, rest))
    bench = lambda name: python("dit_sparse.cli", "bench", name, "--out", out / f"{name}.json")
    budget = ("--minutes", training_minutes, "--resume", "--light")
    trained = ("--model", out / "shapes/shapes-wan", "--steps", 16, "--frames", 20, "--height", 80, "--width", 80)
    wanted = ("--methods", "all", "--density", "0.15,0.25,0.4", "--prompts", 8, "--out", out / "compare")
    return [
        Stage("tests", python("pytest", "-q", *(ROOT / "tests" / name for name in TESTS)), 6),
        Stage("attention", bench("attention"), 9),
        Stage("transformer", bench("transformer"), 9),
        Stage("tilings", python("dit_sparse.eval.bench.tiling_sweep", "--out", out / "tilings.json"), 6),
        Stage(
            "training",
            python("dit_sparse.bundled.shapes_wan.train", "--device", "cuda", *budget, "--out", out / "shapes"),
            8,
        ),
        Stage("compare", python("dit_sparse.cli", "compare", *wanted, *trained), 9, after="training"),
    ]


def run(todo: Sequence[Stage], out: Path, minutes: float) -> list[StageStatus]:
    """Run what is not done yet, for so many minutes in all. ``gpu.json`` in ``out`` says after each stage how all
    stand."""
    end, state = time.monotonic() + 60 * minutes, decided()
    standing = {stage.name: StageStatus(stage.name) for stage in todo} | _before(out, state)
    left = [stage for stage in todo if standing[stage.name].state != "done"]
    for stage in sorted(left, key=lambda stage: (bool(stage.after), TRIED.index(standing[stage.name].state))):
        seconds = end - time.monotonic() - GRACE / 2
        if seconds < LEAST or (stage.after and standing[stage.after].state != "done"):
            continue
        print(f"{stage.name}: at most {min(stage.minutes, seconds / 60):.1f} minutes", flush=True)
        standing[stage.name] = _run(stage, out / f"{stage.name}.log", seconds)
        told = {"decided": state, "stages": [asdict(one) for one in standing.values()]}
        save_json(out / "gpu.json", told | conditions())
    return list(standing.values())


def decided() -> str:
    """A digest of what decides how the stages end: files, versions, device."""
    digest = hashlib.sha256(repr((sources(), versions(), device_name())).encode())
    for path in (*sorted((ROOT / "eval").rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _before(out: Path, state: str) -> dict[str, StageStatus]:
    """How earlier calls into this folder left the stages; nothing where something else decided."""
    try:
        told = json.loads((out / "gpu.json").read_text())
        return {stage["name"]: StageStatus(**stage) for stage in told["stages"]} if told["decided"] == state else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _run(stage: Stage, log: Path, seconds: float) -> StageStatus:
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
    return StageStatus(stage.name, state, time.monotonic() - began)


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
    sys.exit(any(one.state != "done" for one in found))


if __name__ == "__main__":
    main()
