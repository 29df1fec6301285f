"""Candidates: the methods that a profile search compares."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from ..composition import PerHead, nested_methods
from ..method import Method
from ..methods import method, name_of
from ..methods.patterns.dense import Dense
from ..methods.patterns.moa import MoA
from ..notation.syntax import split_list

VDIT_MODES = ("svg.spatial", "svg.temporal", "vdit.vertical", "vdit.skip")
MOA_ALPHAS, MOA_BETAS = (0.5, 1.0, 2.0, 4.0), (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)  # spans in frames, see `MoA`
SPREAD = (0.4, 0.7, 1.0, 1.5, 2.5)  # densities as multiples of the target, if heads may differ in density
LETTERS = string.ascii_lowercase + string.ascii_uppercase + string.digits


@dataclass(frozen=True)
class Candidate:
    """A method that a profile search compares, and its name."""

    name: str
    method: Method

    @property
    def settings(self) -> dict:
        """The settings that a profile stores."""
        return {} if self.method.density is None else {"density": self.method.density}


def parse_candidates(names: str, density: float, spread: Sequence[float] = SPREAD) -> list[Candidate]:
    """Return dense attention and the named methods at several densities.

    Args:
        names: methods separated by commas, such as ``radial(sink=true),svg.temporal``; ``vdit`` stands for its four
            modes, ``moa`` for its spans, whose densities depend on the length of the video.
        density: the target density.
        spread: densities to try, as multiples of ``density``. Those of 1 and above are skipped.

    Raises:
        ValueError: a name is unknown, a method cannot be compared by single calls or share a launch with others, or no
            density is below 1.
    """
    if not spread or not all(factor * density > 0 for factor in spread) or min(spread) * density >= 1:
        raise ValueError(
            f"spread must be positive multiples of the density {density} with one below 1, such as 0.5,1,2, "
            f"got {list(spread)}"
        )
    densities = [factor * density for factor in spread if factor * density < 1]
    candidates, spans = [Candidate("dense", Dense())], _spans()
    for name in _expand(names):
        _check(name)
        if name == "vdit.skip" or name in spans:  # they have no density
            candidates.append(Candidate(name, method(name)))
        elif name != "dense":
            candidates += [Candidate(name, method(name, density=density)) for density in densities]
    if len(candidates) > len(LETTERS):
        raise ValueError(
            f"a profile has {len(LETTERS)} letters for methods, got {len(candidates)} candidates: name fewer methods"
        )
    return candidates


def _expand(names: str) -> list[str]:
    """Return the names without repetitions, with the modes of ``vdit`` and the spans of ``moa`` in their places."""
    split = [name_of(method(name)) for name in split_list(names) if name]
    parts = {"vdit": VDIT_MODES, "moa": _spans()}
    return list(dict.fromkeys(part for name in split for part in parts.get(name, (name,))))


def _spans() -> list[str]:
    """Return the spans of MoA that a search compares, as names of methods."""
    return [name_of(MoA(alpha=alpha, beta=beta)) for alpha in MOA_ALPHAS for beta in MOA_BETAS]


def have_one_density(candidates: Sequence[Candidate]) -> bool:
    """Return whether all candidates have the same density, those without one by their nature excepted."""
    methods = [candidate.method for candidate in candidates if not candidate.method.density_exception]
    return None not in (densities := {one.density for one in methods}) and len(densities) == 1


def _check(name: str) -> None:
    """Raise ValueError if a method cannot be a candidate."""
    candidate = method(name)
    if any(part.reuses_outputs or isinstance(part, PerHead) for part in nested_methods(candidate)):
        raise ValueError(f"{name} cannot be a candidate: single calls do not show its error")
    if candidate.makes_cluster_plans:
        raise ValueError(f"{name} cannot be a candidate: clusters cannot share a launch with blocks")
