"""What a run did: counted while it goes, printed when it is asked for."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch


@dataclass(frozen=True)
class Report:
    """What happened since the run began.

    Attributes:
        method, settings: what decided.
        executors: what computed the sparse calls, and how many each.
        choices: what "auto" chose and why, and for how many layers and kinds of calls; again in every clip where the
            density may be another one.
        grids: the token grids of the sparse calls.
        sparse_calls: self-attention calls that were computed sparsely.
        dense_calls: those that were not, by reason.
        density_asked: what was asked for; None where the method's own settings decided.
        density_achieved: fraction of the pairs computed in sparse calls; None before the first.
        density_run: the same over all self-attention calls, dense steps and layers counted in.
        attention_seconds: time inside self-attention calls, planning included.
        planning_seconds: the part of it that went into plans.
    """

    method: str
    settings: dict
    executors: dict[str, int]
    choices: dict[str, int]
    grids: list[str]
    sparse_calls: int
    dense_calls: dict[str, int]
    density_asked: float | None
    density_achieved: float | None
    density_run: float | None
    attention_seconds: float
    planning_seconds: float

    def as_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        percent = lambda x: "-" if x is None else f"{x:.3f}"
        lines = [
            f"{self.method}: density asked {percent(self.density_asked)}, achieved {percent(self.density_achieved)}, "
            f"whole run {percent(self.density_run)}",
            f"  grid       {', '.join(self.grids) or '-'}",
            f"  sparse     {self.sparse_calls} calls"
            + "".join(f", {n} by {name}" for name, n in self.executors.items()),
            *(f"  choice     {choice}" for choice in sorted(self.choices, key=self.choices.get, reverse=True)[:3]),
            *(f"  dense      {n} calls: {reason}" for reason, n in self.dense_calls.items()),
            f"  attention  {self.attention_seconds:.1f} s, of it {self.planning_seconds:.1f} s planning",
        ]
        return "\n".join(lines)


@dataclass
class RunCounters:
    """The counters behind a report."""

    executors: Counter = field(default_factory=Counter)
    choices: Counter = field(default_factory=Counter)
    dense: Counter = field(default_factory=Counter)
    grids: dict[str, None] = field(default_factory=dict)
    sparse_calls: int = 0
    sparse_pairs: int = 0
    computed_in_sparse: float | torch.Tensor = 0.0  # a tensor while it grows: reading it would wait for a GPU
    dense_pairs: int = 0
    unseen_calls: int = 0
    attention: Stopwatch = field(default_factory=lambda: Stopwatch())
    planning: Stopwatch = field(default_factory=lambda: Stopwatch())

    def count_sparse(self, grid: object, pairs: int, share: torch.Tensor) -> None:
        self.sparse_calls += 1
        self.grids[str(grid)] = None
        self.sparse_pairs += pairs
        self.computed_in_sparse += pairs * share

    def count_dense(self, reason: str, pairs: int | None) -> None:
        """``pairs`` None: a call that was not seen; it counts as much as the others on average."""
        self.dense[reason] += 1
        self.unseen_calls += pairs is None
        self.dense_pairs += pairs or 0

    @property
    def density_achieved(self) -> float | None:
        return float(self.computed_in_sparse) / self.sparse_pairs if self.sparse_pairs else None

    @property
    def density_run(self) -> float | None:
        seen_calls = self.sparse_calls + self.dense.total() - self.unseen_calls
        unseen = self.unseen_calls * (self.sparse_pairs + self.dense_pairs) / max(seen_calls, 1)
        pairs = self.sparse_pairs + self.dense_pairs + unseen
        return (float(self.computed_in_sparse) + self.dense_pairs + unseen) / pairs if pairs else None


class Stopwatch:
    """Adds up durations: by the clock on a CPU, by events on a GPU, read only when the sum is asked for."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def timing(self, device: torch.device):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin

    @property
    def seconds(self) -> float:
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
            self._events.clear()
        return self._seconds
