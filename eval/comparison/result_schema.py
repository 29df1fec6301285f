"""Schema of ``compare.json``. Everything that tables and pages read is validated before they are made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from dit_sparse.notation.reading import read_json

Interval = Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)]
Density = Annotated[FiniteFloat, Field(gt=0, le=1)]
NonEmpty = Field(min_length=1)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Difference(_Strict):
    mean: FiniteFloat
    interval: Interval | None


class _Statistics(_Strict):
    """Of a metric over the clips; a mean is None if it is infinite, as the PSNR of equal clips is."""

    mean: FiniteFloat | None
    median: FiniteFloat | None
    worst_decile: FiniteFloat | None
    interval: Interval | None
    each: Annotated[list[FiniteFloat | None], NonEmpty]


class _Unavailable(_Strict):
    unavailable: str


class _Failure(_Strict):
    name: str
    error: str


class _Row(_Strict):
    name: str
    method: str
    kind: str | None = None
    steps: Annotated[int, Field(gt=0)]
    settings: dict
    density_asked: Density | None
    density_achieved: FiniteFloat | None
    density_hit: bool | None
    density_run: FiniteFloat
    tail_density: FiniteFloat = 0.0
    retained: FiniteFloat | None
    mass: Annotated[list[Annotated[list[FiniteFloat], NonEmpty]], NonEmpty] | None
    error: FiniteFloat | None
    psnr: _Statistics | None
    ssim: _Statistics | None
    ms_ssim: _Statistics | _Unavailable | None
    xpsnr: _Statistics | _Unavailable | None = None
    vmaf: _Statistics | _Unavailable | None = None
    lpips: _Statistics | _Unavailable | None
    st_lpips: _Statistics | _Unavailable | None = None
    cvvdp: _Statistics | _Unavailable | None = None
    over_random: _Difference | None
    quality: dict[str, FiniteFloat | _Unavailable] | None
    seconds: FiniteFloat
    speedup: FiniteFloat
    attention_speedup: FiniteFloat
    planning_share: FiniteFloat
    busy_clips: Annotated[int, Field(ge=0)] = 0
    strip: Annotated[str, Field(pattern="^[A-Za-z0-9+/=]*$")]
    equal_to: list[str] = []
    device: str | None = None
    executor: str | None = None
    commits: list[str] = []

    @property
    def available_dimensions(self) -> set[str]:
        return {name for name, value in (self.quality or {}).items() if isinstance(value, float)}


class _Source(_Strict):
    """A comparison whose rows a merged result contains."""

    device: str
    commit: str | None
    versions: dict[str, str | None]
    executor: str
    rows: Annotated[int, Field(ge=0)]


class _RowDifference(_Strict):
    """Numbers of a row in another result, ``{column: [kept, other]}``."""

    name: str
    device: str
    numbers: dict[str, Annotated[list[str], Field(min_length=2, max_length=2)]]


class _Schedule(_Strict):
    dense_steps: int | float


class _Result(_Strict):
    model: str
    call: dict
    prompts: Annotated[list[str], NonEmpty]
    densities: Annotated[list[Density], NonEmpty]
    seeds: Annotated[int, Field(gt=0)]
    first_seed: Annotated[int, Field(ge=0)] = 0
    schedule: _Schedule
    executor: str
    grids: list[str]
    steps: Annotated[int, Field(gt=0)]
    device: str
    versions: dict[str, str | None]
    commit: str | None
    rows: Annotated[list[_Row], NonEmpty]
    finished: bool = True
    failures: list[_Failure] = []
    sources: list[_Source] = []
    differences: list[_RowDifference] = []

    @model_validator(mode="after")
    def _check_consistency(self) -> _Result:
        if "torch" not in self.versions:
            raise ValueError("versions contain no torch")
        scored = [row for row in self.rows if row.quality]
        if any(row.available_dimensions != scored[0].available_dimensions for row in scored):
            raise ValueError("rows differ in the dimensions of their quality")
        return self


def read_result(path: Path) -> dict:
    """Read and validate a ``compare.json``.

    Raises:
        ValueError: the file is missing, or not a result of ``dit-sparse compare``.
    """
    try:
        result = read_json(path)
        check_result(result)
    except ValueError as error:
        raise ValueError(f"{path} is not a result of dit-sparse compare: {error}") from None
    return result


def check_result(result: dict) -> None:
    """Raise ValueError, with the place of the first error, if a value is not the content of a ``compare.json``."""
    try:
        _Result.model_validate(result)
    except ValidationError as error:
        raise ValueError(first_error(error)) from None


def first_error(error: ValidationError) -> str:
    """Return the first error of a validation with its place in the file, in one line."""
    first = error.errors()[0]
    place, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
