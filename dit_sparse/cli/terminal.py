"""Output of the commands: consoles, error messages, tables and progress bars."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console, error_console = Console(), Console(stderr=True)
SECONDS_BETWEEN_LINES = 60  # of progress in a file or pipe


@contextmanager
def one_sentence() -> Iterator[None]:
    """End the command with one sentence on standard error: exit code 1 for a RuntimeError, 130 for Ctrl-C, 2 for any
    other error. The traceback of an unexpected error is logged at debug level."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        logging.getLogger("dit_sparse").debug("the command failed", exc_info=True)
        print_error(_message(error))
        failed = isinstance(error, RuntimeError) and not isinstance(error, RecursionError | NotImplementedError)
        raise typer.Exit(1 if failed else 2) from None
    except KeyboardInterrupt:
        print_error("interrupted")
        raise typer.Exit(130) from None


def print_error(message: str) -> None:
    error_console.print(f"dit-sparse: {message}", highlight=False, markup=False, soft_wrap=True)


def _message(error: Exception) -> str:
    from dit_sparse.notation.reading import shorten_path

    if isinstance(error, OSError) and error.strerror:
        path = error.filename2 or error.filename  # os.replace has two: the second is the file that the user named
        return f"{shorten_path(path)}: {error.strerror}" if path else error.strerror
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return "out of memory: use fewer frames, a smaller size or a lower density"
    if isinstance(error, RecursionError):
        return "the input is nested too deep"
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, ValueError | RuntimeError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text}"


def make_table(*columns: str) -> Table:
    """Return a table with these headings."""
    return Table(*columns, box=None, header_style="bold")


def make_number_table(title: str, name: str, *columns: str) -> Table:
    """Return a table of numbers with one space between columns, so that 80 columns are enough for ten of them.

    Headings wrap at spaces, and numbers are at most as wide as the heading; the first column takes the remaining width,
    in which longer names are folded.
    """
    table = Table(title=title, box=None, header_style="bold", title_style="bold", title_justify="left", expand=True)
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    table.add_column(name, overflow="fold", ratio=1)
    for column in columns:
        table.add_column(column, justify="right", width=max(5, *map(len, column.split())))
    return table


def decimals(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


@contextmanager
def progress_bars() -> Iterator[Any]:
    """Yield ``stage(name)``, which starts a bar and returns ``progress(done, steps)``. The first and latest bars stay
    visible. In a file or pipe, a line is printed every minute instead."""
    if not error_console.is_terminal:
        yield _progress_lines
        return
    columns = (
        TextColumn("{task.description:>14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=error_console, speed_estimate_period=600) as bars:

        def stage(name: str) -> Any:
            for old in bars.task_ids[1:-3]:
                bars.update(old, visible=False)
            task = bars.add_task(name, total=None)
            return lambda done, steps: bars.update(task, completed=done, total=steps)

        yield stage


def _progress_lines(name: str) -> Any:
    """Return ``progress(done, steps)``, which prints a line with the time left at most once a minute."""
    begin = printed = time.monotonic()

    def progress(done: int, steps: int) -> None:
        nonlocal printed
        now = time.monotonic()
        if now - printed >= SECONDS_BETWEEN_LINES:
            printed = now
            left = f", {duration((now - begin) * (steps - done) / done)} left" if done else ""
            error_console.print(f"{name}: {done} of {steps}{left}", highlight=False, markup=False, soft_wrap=True)

    return progress


def duration(seconds: float) -> str:
    """Return a duration as text, such as ``1 h 05 min``."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
