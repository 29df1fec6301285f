"""Rows of a comparison, and the prompts and seeds of which every row has a clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dit_sparse import SparseAttnProcessor


class Sample(NamedTuple):
    """A prompt and a seed, of which every row has one clip."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class ClipSpec:
    """How the clips of one row are generated: a method at a density, or dense attention with fewer steps.

    Attributes:
        requested_as: the row as requested.
        method: name of the method.
        density: requested density; None for dense attention, profiles and methods at their own settings.
        processor: the processor to set.
        steps: denoising steps; None: those of the comparison.
        equal_to: names of the rows that cost as much as dense attention with these steps.
    """

    requested_as: str
    method: str
    density: float | None
    processor: SparseAttnProcessor
    steps: int | None = None
    equal_to: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        if self.steps is not None:
            return f"{self.method}, {self.steps} steps"
        return self.method if self.density is None else f"{self.method} {self.density:g}"

    @property
    def is_reference(self) -> bool:
        """Whether this is dense attention with all steps, which other rows are compared with."""
        return self.method == "dense" and self.steps is None


DENSE_SPEC = ClipSpec("dense", "dense", None, SparseAttnProcessor("dense", min_tokens=0))
