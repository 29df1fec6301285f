"""Text form of the rows of a comparison: a method, with or without a density of its own.

Examples: ``svg``, ``svg@0.3``, ``radial(sink=true)@own``, ``asa(budget=mass(0.9))``, ``profile:NAME``.
"""

from __future__ import annotations

from dataclasses import dataclass

from dit_sparse import SparseAttnProcessor
from dit_sparse.budget import Top
from dit_sparse.methods import name_of
from dit_sparse.notation.parser import parse
from dit_sparse.notation.syntax import sets_density, split_list


@dataclass(frozen=True)
class RowRequest:
    """One requested row, or one row per density of the comparison.

    Attributes:
        text: the row as requested.
        method: canonical text of the method, without its density.
        density: requested density; None: the method's own settings.
        every_density: whether the method gets a row at every density of the comparison.
    """

    text: str
    method: str
    density: float | None = None
    every_density: bool = False


def parse_row(text: str) -> RowRequest:
    """Read the text form of a row. A method that sets its density or budget, and a profile, is one row.

    Raises:
        ValueError: the text has another form, or the density is not in (0, 1].
    """
    method, *densities = split_list(text, "@")
    node = parse(method)
    parsed = SparseAttnProcessor(method).settings.method
    name = name_of(parsed)
    if name == "dense":
        if densities:
            raise ValueError(f"{text!r}: dense attention computes all pairs and takes no density, write dense")
        return RowRequest(text, name)
    if sets_density(node):
        if densities not in ([], ["own"]):
            raise ValueError(f"{text!r}: the method sets its density or budget, write {name}")
        return RowRequest(text, name, parsed.density)
    if not densities:
        return RowRequest(text, name, every_density=True)
    if densities == ["own"]:
        return RowRequest(text, name)
    try:
        (density,) = map(float, densities)
    except ValueError:
        raise ValueError(f"{text!r}: write METHOD@DENSITY, such as svg@0.3, or METHOD@own") from None
    return RowRequest(text, name, round_density(density))


def round_density(density: float) -> float:
    """Return a density rounded to four digits. Raises ValueError if it is not in (0, 1]."""
    return Top(round(Top(density).density, 4)).density  # raises ValueError outside (0, 1]
