"""Output of the commands: consoles, the result as JSON, the log, error messages, tables and progress."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console, error_console = Console(), Console(stderr=True)
LINES_PER_STAGE = 10  # of progress in a file or pipe, and another line a minute
SECONDS_BETWEEN_LINES = 60


@dataclass
class OutputOptions:
    """The shared options of the running command: ``--json``, ``--quiet`` and ``--verbose``."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False


_options = OutputOptions()


@contextmanager
def output_options(json_output: bool, quiet: bool, verbose: bool) -> Iterator[None]:
    """Apply the shared options to all output while a command runs.

    With ``--json`` or ``--quiet`` nothing is printed on standard output but the result as JSON. The log of the package
    is printed on standard error: warnings with ``--quiet``, also what takes long by default, everything with
    ``--verbose``.
    """
    if quiet and verbose:
        with one_sentence():
            raise ValueError("--quiet and --verbose cannot be combined")
    before = vars(_options).copy()
    vars(_options).update(json=json_output, quiet=quiet, verbose=verbose)
    console.quiet = json_output or quiet
    log, handler = logging.getLogger("dit_sparse"), _LogHandler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        vars(_options).update(before)
        console.quiet = before["json"] or before["quiet"]


class _LogHandler(logging.Handler):
    """Prints records on standard error, above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        error_console.print(self.format(record), highlight=False, markup=False, soft_wrap=True)


def print_result(result: Any) -> None:
    """Print the result of a command as JSON if ``--json`` is given. Infinity becomes ``"inf"`` and NaN null."""
    if _options.json:
        from dit_sparse.output.files import json_values

        print(json.dumps(json_values(result), indent=2, allow_nan=False))


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


def warn_if_busy(result: dict) -> None:
    """Print a warning if the machine was busy when the times of a result, with its conditions, were measured."""
    from dit_sparse.output.environment import busy_warning

    if warning := busy_warning(result.get("load")):
        print_error(f"warning: {warning}")


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


def make_table(*columns: str, numbers: int = 0) -> Table:
    """Return a table with these headings. The last ``numbers`` columns are aligned to the right and not wrapped; other
    cells that are too long are folded, so that nothing is cut."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1 if numbers > 4 else 2, 0, 0))
    for number, column in enumerate(columns):
        is_number = number >= len(columns) - numbers
        table.add_column(column, overflow="fold", no_wrap=is_number, justify="right" if is_number else "left")
    return table


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
    visible. In a file or pipe, lines are printed instead, about ten for each stage; with ``--quiet`` none."""
    if _options.quiet:
        yield lambda name: lambda done, steps: None
        return
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
    """Print that a stage begins, and return ``progress(done, steps)``, which prints a line with the time left after
    each tenth of the steps, and at least once a minute."""
    print_line = lambda text: error_console.print(text, highlight=False, markup=False, soft_wrap=True)
    begin = printed = time.monotonic()
    group = 0
    print_line(f"{name} ...")

    def progress(done: int, steps: int) -> None:
        nonlocal printed, group
        now, reached = time.monotonic(), LINES_PER_STAGE * done // max(steps, 1)
        if reached > group or now - printed >= SECONDS_BETWEEN_LINES:
            printed, group = now, reached
            seconds_left = (now - begin) * (steps - done) / done if done else None
            left = "" if seconds_left is None or done >= steps else f", {duration(seconds_left)} left"
            print_line(f"{name}: {done} of {steps}{left}")

    return progress


def duration(seconds: float) -> str:
    """Return a duration as text, such as ``40 s``, ``12 min`` or ``1 h 05 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
