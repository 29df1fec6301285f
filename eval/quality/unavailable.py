"""The error of measures whose package or weights are missing. Nothing is downloaded for a measurement."""

from __future__ import annotations

from pathlib import Path


class Unavailable(RuntimeError):
    """A measure cannot be computed here; the message says what is missing and how to get it."""


def display_path(path: Path) -> str:
    """Return a path with ~ for the home folder, so that results do not contain a user's name."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)
