"""All work that needs an NVIDIA GPU, in one command that can be interrupted and repeated.

    python -m dit_sparse.eval.bench.gpu_suite --out DIR [--minutes 25]

The stages are the kernel tests on the device, the attention and transformer benchmarks, the tiling sweep, further
training of shapes-wan-i2v, and a comparison of all methods on the trained model. Each stage runs in a process with a
time limit. A later call with the same folder runs the remaining stages, those that never started first; training and
comparison resume. After a change of source files, package versions or device all stages run again. Results are JSON
files in the folder, and the last lines printed are the status of every stage.
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

from dit_sparse.bundled import BUNDLED, model_source
from dit_sparse.output.environment import conditions, device_name, source_digest, versions
from dit_sparse.output.files import save_json, writable_folder

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    "kernels/test_triton.py",
    "kernels/test_cluster_plans.py",
    "kernels/test_tail.py",
    "kernels/test_pooling_error.py",
    "kernels/test_kmeans.py",
    "kernels/test_selection.py",
    "eval/test_attention_bench.py",
    "eval/test_tiling_sweep.py",
)
RESUME_ORDER = ("not started", "stopped", "failed")
GRACE_SECONDS = 30  # between SIGTERM and SIGKILL; training saves and exports in this time
MIN_SECONDS = 20  # no stage starts with less time left


@dataclass(frozen=True)
class Stage:
    """One process of the suite.

    Attributes:
        name: also names its log.
        command: program and arguments.
        minutes: time limit.
        after: name of a stage that must be done before this one starts.
    """

    name: str
    command: Sequence[str]
    minutes: float
    after: str | None = None


@dataclass(frozen=True)
class StageStatus:
    """Outcome of a stage: ``done``, ``failed``, ``stopped`` at its time limit, or ``not started``."""

    name: str
    state: str = "not started"
    seconds: float = 0.0


def stages(out: Path, training_minutes: float) -> list[Stage]:
    """Return all stages in order. The comparison uses the trained model, with clips of the demo's size."""
    python = lambda module, *rest: (sys.executable, "-m", module, *map(str, rest))
    bench = lambda name: python("dit_sparse.cli", "bench", name, "--out", out / f"{name}.json")
    training = ("--device", "cuda", "--minutes", training_minutes, "--resume", "--light", "--out", out / "shapes")
    training += ("--start", model_source(BUNDLED))
    model = ("--model", out / "shapes" / BUNDLED, "--steps", 16, "--frames", 13, "--height", 96, "--width", 96)
    rows = ("--methods", "all", "--density", "0.15,0.25,0.4", "--prompts", 8, "--out", out / "compare")
    return [
        Stage("tests", python("pytest", "-q", *(ROOT / "tests" / name for name in TESTS)), 6),
        Stage("attention", bench("attention"), 9),
        Stage("tail", bench("tail"), 3),
        Stage("transformer", bench("transformer"), 9),
        Stage("tilings", python("dit_sparse.eval.bench.tiling_sweep", "--out", out / "tilings.json"), 6),
        Stage("training", python("dit_sparse.bundled.shapes_wan.train", *training), 8),
        Stage("compare", python("dit_sparse.cli", "compare", *rows, *model), 9, after="training"),
    ]


def run(todo: Sequence[Stage], out: Path, minutes: float) -> list[StageStatus]:
    """Run the stages that are not done and write the status of all to ``gpu.json`` after each.

    Args:
        todo: the stages.
        out: folder for logs and ``gpu.json``.
        minutes: time limit of all stages together.
    """
    end, fingerprint = time.monotonic() + 60 * minutes, suite_fingerprint()
    status = {stage.name: StageStatus(stage.name) for stage in todo} | _stored_status(out, fingerprint)
    open_stages = [stage for stage in todo if status[stage.name].state != "done"]
    open_stages.sort(key=lambda stage: (bool(stage.after), RESUME_ORDER.index(status[stage.name].state)))
    for stage in open_stages:
        seconds = end - time.monotonic() - GRACE_SECONDS / 2
        if seconds < MIN_SECONDS or (stage.after and status[stage.after].state != "done"):
            continue
        print(f"{stage.name}: at most {min(stage.minutes, seconds / 60):.1f} minutes", flush=True)
        status[stage.name] = _run_stage(stage, out / f"{stage.name}.log", seconds)
        record = {"fingerprint": fingerprint, "stages": [asdict(one) for one in status.values()]}
        save_json(out / "gpu.json", record | conditions())
    return list(status.values())


def suite_fingerprint() -> str:
    """Return a digest of everything that affects the outcome of the stages: source files, versions, device."""
    digest = hashlib.sha256(repr((source_digest(), versions(), device_name())).encode())
    for path in (*sorted((ROOT / "eval").rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _stored_status(out: Path, fingerprint: str) -> dict[str, StageStatus]:
    """Return the status that an earlier call stored; empty if its fingerprint differs or nothing is readable."""
    try:
        record = json.loads((out / "gpu.json").read_text())
        if record["fingerprint"] != fingerprint:
            return {}
        return {stage["name"]: StageStatus(**stage) for stage in record["stages"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _run_stage(stage: Stage, log: Path, seconds: float) -> StageStatus:
    """Run one stage with its output in a log, and end its whole process group."""
    begin, stopped = time.monotonic(), False
    with log.open("w") as file:
        process = subprocess.Popen(stage.command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
    try:
        process.wait(min(60 * stage.minutes, seconds))
    except subprocess.TimeoutExpired:
        stopped = True
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    state = "stopped" if stopped else "failed" if process.returncode else "done"
    return StageStatus(stage.name, state, time.monotonic() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for results and logs")
    parser.add_argument("--minutes", type=float, default=60.0, help="time limit of this call")
    parser.add_argument("--training-minutes", type=float, default=22.0, help="training time of all calls together")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "gpu_suite requires an NVIDIA GPU, and torch finds none: nothing was run\n")
    try:
        out = writable_folder(options.out.resolve())
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    status = run(stages(out, options.training_minutes), out, options.minutes)
    for one in status:
        print(f"{one.name:12} {one.state:12} {one.seconds / 60:5.1f} min")
    sys.exit(any(one.state != "done" for one in status))


if __name__ == "__main__":
    main()
