"""What all commands share: where they print, how they end, how they show progress."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console, complaints = Console(), Console(stderr=True)


@contextmanager
def one_sentence():
    """Wrong input ends in one sentence on standard error and exit code 2; Ctrl-C in 130."""
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        complaints.print(f"dit-sparse: {_told(error)}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1 if isinstance(error, RuntimeError) else 2) from None
    except KeyboardInterrupt:
        complaints.print("dit-sparse: interrupted")
        raise typer.Exit(130) from None


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        place = error.filename2 or error.filename  # of two the second, which a finished file was to replace
        return f"{place}: {error.strerror}" if place else error.strerror
    return str(error)


def names(text: str) -> list[str]:
    """``"radial, svg"``: both."""
    return [name.strip() for name in text.split(",") if name.strip()]


@contextmanager
def progress_bars():
    """Yields ``stage(name)``, which begins a bar and returns ``progress(done, steps)``. Of many bars the first and the
    latest stay in sight."""
    columns = (
        TextColumn("{task.description:>14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=complaints) as bars:

        def stage(name: str) -> Any:
            for old in bars.task_ids[1:-3]:
                bars.update(old, visible=False)
            task = bars.add_task(name, total=None)
            return lambda done, steps: bars.update(task, completed=done, total=steps)

        yield stage
