"""Timing of functions on CPU and GPU: single calls, medians of functions that take turns, peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

MIN_ROUNDS, MAX_ROUNDS = 3, 50


def time_call(function: Callable, device: str) -> float:
    """Return the seconds of one call, by CUDA events on ``"cuda"``."""
    if device != "cuda":
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def cpu_time_of_call(function: Callable, device: str) -> float:
    """Return the seconds of one call as `time_call`; on a CPU, those that this process computes, in all its threads, so
    that other processes have little effect."""
    if device == "cuda":
        return time_call(function, device)
    begin = time.process_time()
    function()
    return time.process_time() - begin


def median_seconds(function: Callable, device: str, repeats: int) -> float:
    """Return the median seconds of ``repeats`` calls."""
    return statistics.median(time_call(function, device) for _ in range(repeats))


def interleaved_medians(functions: Mapping[str, Callable], seconds: float, device: str) -> dict[str, float]:
    """Return the medians of `interleaved_durations`."""
    durations = interleaved_durations(functions, seconds, device)
    return {name: statistics.median(values) for name, values in durations.items()}


def interleaved_durations(
    functions: Mapping[Any, Callable],
    seconds: float,
    device: str,
    timer: Callable[[Callable, str], float] | None = None,
) -> dict[Any, list[float]]:
    """Return the seconds of functions that take turns, in every round, so that a busy machine slows all of them alike.

    Args:
        functions: by name. Each is called once before the first timed round.
        seconds: about how long to measure in all.
        device: ``"cpu"`` or ``"cuda"``.
        timer: `cpu_time_of_call`, for example; None: `time_call`.
    """
    timer = timer or time_call
    for function in functions.values():
        function()
    durations: dict[Any, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for name, function in functions.items():
            durations[name].append(timer(function, device))
    return durations


def synchronize(device: str) -> None:
    """Wait for the GPU; does nothing on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(function: Callable, device: str) -> int | None:
    """Return the memory that a call allocates on top of what is allocated already; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def first_line(error: BaseException) -> str:
    """Return the first line of an error message, or the error's type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
