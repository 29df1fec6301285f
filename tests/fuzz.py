"""Compute random attention calls and check them against float64 attention, see ``tests/helpers/case_checks.py``.

    python tests/fuzz.py --cases 2000 --minutes 10
    python tests/fuzz.py --seed 7 --case 123    # repeat one case

Exits with 1 if a case fails.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it on import
sys.path[:0] = [str(Path(__file__).parent / "helpers"), str(Path(__file__).parents[1])]

from case_checks import check, check_pipeline  # noqa: E402
from dit_sparse.kernels import calibration  # noqa: E402
from random_cases import EXECUTORS, Case  # noqa: E402

PIPELINES = ("wan", "hunyuan_video", "cogvideox", "mochi", "ltx", "wan22", "cogvideox15", "wan22_5b")
PROGRESS_SECONDS = 15


def main() -> int:
    parser = argparse.ArgumentParser(description="Check random attention calls against float64 attention.")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of all cases; default: the time")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this time")
    parser.add_argument("--case", type=int, help="number of the only case to compute")
    parser.add_argument("--pipelines", action="store_true", help="generate videos by tiny diffusers pipelines instead")
    parser.add_argument("--executors", default=",".join(EXECUTORS), help="executors to choose from")
    parser.add_argument("--device", default="cpu", help="of calls without a pipeline")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    calibration.TIMING_SIZES["cpu"] = (256, 1)  # measure cost models quickly
    if options.case is not None:
        print(compute(options.case, options, show=print) or "passed")
        return 0
    return compute_all(options, repeat_command(parser, options))


def compute(number: int, options: argparse.Namespace, show=lambda case: None) -> str | None:
    """Compute a case. Return None, or why the library refuses it. Raises if the case fails."""
    executors = tuple(options.executors.split(","))
    if not options.pipelines:
        show(case := Case.random(options.seed, number, executors))
        return check(case, options.device)
    from sparse_pipelines import cached_pipeline, count_layers

    stock = cached_pipeline(PIPELINES[number % len(PIPELINES)])
    case = Case.random(options.seed, number, executors, model=(2, count_layers(stock)))
    show(f"{stock.name}: {case}")
    return check_pipeline(case, stock)


def compute_all(options: argparse.Namespace, command: str) -> int:
    """Compute all cases, print progress, failures and a summary; return the exit code."""
    print(f"seed {options.seed}", flush=True)
    refusals, failures, done = Counter(), Counter(), 0
    started = last = time.monotonic()
    while done < options.cases and time.monotonic() - started < 60 * options.minutes:
        try:
            if refusal := compute(done, options):
                refusals[re.sub(r"[\d.]+", "#", refusal)] += 1
        except Exception as error:
            reason = f"{type(error).__name__}: {error}" if not isinstance(error, AssertionError) else str(error)
            reason = " ".join(reason.split())[:300]
            failures[re.sub(r"[-+\d.e]*\d[-+\d.e]*", "#", reason)] += 1
            print(f"FAILED {command} --case {done}\n  {reason}\n  {place(error)}", flush=True)
        done += 1
        if time.monotonic() - last > PROGRESS_SECONDS:
            last = time.monotonic()
            print(f"{done} of {options.cases} cases, {failures.total()} failed", flush=True)
    print(f"seed {options.seed}: {done} cases, {failures.total()} failed, {refusals.total()} refused")
    for title, counts in (("refused", refusals), ("failed", failures)):
        for reason, count in counts.most_common():
            print(f"{count:5} {title}: {reason}")
    return int(failures.total() > 0)


def place(error: Exception) -> str:
    """Return where an error was raised, without the frames of PyTorch."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames[:-4:-1])


def repeat_command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """Return the command that repeats a case, up to its number."""
    parts = [f"--seed {options.seed}", *(["--pipelines"] if options.pipelines else [])]
    changed = (name for name in ("executors", "device") if getattr(options, name) != parser.get_default(name))
    return " ".join(["python tests/fuzz.py", *parts, *(f"--{name} {getattr(options, name)}" for name in changed)])


if __name__ == "__main__":
    sys.exit(main())
