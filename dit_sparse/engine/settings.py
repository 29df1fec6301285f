"""The validated settings of a run."""

from __future__ import annotations

from dataclasses import dataclass

from ..composition import nested_methods
from ..grid import Grid
from ..method import Method
from ..methods import name_of
from ..notation.settings import Range, check_fields, within
from ..schedule import Schedule

BLOCKS = Range("a multiple of 16 in [16, 256]", lambda tokens: tokens in range(16, 257, 16))
SHORT_SEQUENCE = 32_768  # tokens; below it, blocks of 64 select more finely than 128 at little loss of speed


@dataclass(frozen=True)
class Settings:
    """The settings of a run, documented in ``SparseAttnProcessor``.

    Raises:
        ValueError: a setting has the wrong type or lies outside of its range.
    """

    method: Method
    schedule: Schedule
    executor: str
    block: int | None = within(BLOCKS)
    min_tokens: int | None = within("[0, 1000000000]")
    steps: int | None = within("[1, 1000000]")
    guard: float | None = within("(0, 1)", None)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.schedule.density_ramp and all(part.density is None for part in nested_methods(self.method)):
            raise ValueError("density_ramp needs a density, and the method's own settings decide: pass density=")

    @property
    def density_varies(self) -> bool:
        """Whether the density can differ between clips."""
        return not self.method.static and self.method.density is None

    def block_for(self, grid: Grid) -> int:
        """Return the number of tokens in a block."""
        return self.block or (64 if grid.tokens < SHORT_SEQUENCE else 128)

    def min_tokens_reason(self, grid: Grid) -> str | None:
        """Return why a sequence is too short to be sparse, or None if it is long enough."""
        min_tokens = self.min_tokens or 0
        return f"fewer than {min_tokens} tokens" if grid.tokens < min_tokens else None

    def __str__(self) -> str:
        """The method and its density, for the ``repr`` of runs and processors."""
        density = self.method.density
        return name_of(self.method) + ("" if density is None else f", density {density:g}")
