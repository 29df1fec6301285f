"""The validated settings of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..composition import nested_methods
from ..grid import Grid
from ..method import Method
from ..methods import method_at_density, name_of
from ..notation.settings import Range, check_fields, within
from ..schedule import Schedule

if TYPE_CHECKING:  # pydantic takes longer to import than the rest of the package
    from ..profiling.head_profile import Profile

BLOCKS = Range("a multiple of 16 in [16, 256]", lambda tokens: tokens in range(16, 257, 16))
SHORT_SEQUENCE = 32_768  # tokens; below it, blocks of 64 select more finely than 128 at little loss of speed


@dataclass(frozen=True)
class Settings:
    """The settings of a run, documented in ``SparseAttnProcessor``. ``preset`` is the name of the preset, with the
    source of its schedule, or None.

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
    preset: str | None = None

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


def make_method(method: str | Method, density: float | None, settings: dict) -> tuple[Method, Profile | None]:
    """Return the method with the requested density and settings, and the profile in its text.

    Raises:
        ValueError: the text cannot be read, or a setting is unknown or out of range.
    """
    if isinstance(method, str):
        return _parse_method(method, density, settings)
    if not isinstance(method, Method):
        raise ValueError(f"method must be a text or a dit_sparse.Method, got {type(method).__name__}")
    if settings:
        raise ValueError(f"method settings such as {next(iter(settings))!r} need a method's name, got a Method")
    return (method if density is None else replace(method, density=density)), None


def _parse_method(text: str, density: float | None, settings: dict) -> tuple[Method, Profile | None]:
    profiles: list[Profile] = []

    def load_profile(name: str) -> Method:
        from ..profiling.head_profile import Profile

        profiles.append(Profile.load(name))
        return replace(profiles[-1].to_method(), profile=name)

    method = method_at_density(text, density, settings, load_profile)
    if len(profiles) > 1:
        raise ValueError(f"a method can hold one profile, got {len(profiles)} in {text[:60]!r}")
    return method, profiles[0] if profiles else None
