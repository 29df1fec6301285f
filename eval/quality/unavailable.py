"""The error of measures whose package or weights are missing. Nothing is downloaded for a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Unavailable(RuntimeError):
    """A measure cannot be computed here; the message says what is missing and how to get it."""


@contextmanager
def import_failure(package: str) -> Iterator[None]:
    """Turn the errors of importing a package of the extra ``metrics`` into Unavailable."""
    try:
        yield
    except ImportError as error:
        missing = error.name or package
        raise Unavailable(f"the package {missing} is not installed; get it with: pip install -e '.[metrics]'") from None
    except Exception as error:  # such as a torchvision that was built for another torch
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = "; get the torchvision that fits torch, see docs/evaluation.md" if "torchvision" in reason else ""
        raise Unavailable(f"the package {package} cannot be imported: {reason[:200]}{hint}") from None


def display_path(path: Path) -> str:
    """Return a path with ~ for the home folder, so that results do not contain a user's name."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)
