"""Text form of the rows of a comparison: ``svg``, ``svg@0.3``, ``radial@own``, ``profile:NAME``."""

from __future__ import annotations

from dataclasses import dataclass

from dit_sparse.budget import check_density


@dataclass(frozen=True)
class RowRequest:
    """One requested row, or one row per density of the comparison.

    Attributes:
        text: the row as requested.
        method: name of the method or profile.
        density: requested density; None: the method's own settings.
        every_density: whether the method gets a row at every density of the comparison.
    """

    text: str
    method: str
    density: float | None = None
    every_density: bool = False


def parse_row(text: str) -> RowRequest:
    """Read the text form of a row.

    Raises:
        ValueError: the text has another form, or the density is not in (0, 1].
    """
    if text.startswith("profile:") or text == "dense":
        return RowRequest(text, text)
    method, at, density = text.partition("@")
    if not at:
        return RowRequest(text, method, every_density=True)
    if method == "dense":
        raise ValueError(f"{text!r}: dense attention computes all pairs and takes no density, write dense")
    if density in ("", "own"):
        return RowRequest(text, method)
    try:
        value = float(density)
    except ValueError:
        raise ValueError(f"{text!r}: write METHOD@DENSITY, such as svg@0.3, or METHOD@own") from None
    return RowRequest(text, method, round_density(value))


def round_density(density: float) -> float:
    """Return a density rounded to four digits. Raises ValueError if it is not in (0, 1]."""
    return check_density(round(check_density(density), 4))
