"""What ``dit-sparse compare`` wrote, read again: all that table and page read is checked before anything is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

Interval = Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)]
Density = Annotated[FiniteFloat, Field(gt=0, le=1)]
Many = Field(min_length=1)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Difference(_Strict):
    mean: FiniteFloat
    interval: Interval | None


class _Spread(_Strict):
    """Of the clips; None where a mean is infinite, as the PSNR of equal clips is."""

    mean: FiniteFloat | None
    median: FiniteFloat | None
    worst_decile: FiniteFloat | None
    interval: Interval | None
    each: Annotated[list[FiniteFloat | None], Many]


class _Unavailable(_Strict):
    unavailable: str


class _Row(_Strict):
    name: str
    method: str
    steps: Annotated[int, Field(gt=0)]
    settings: dict
    density_asked: Density | None
    density_achieved: FiniteFloat | None
    density_hit: bool | None
    density_run: FiniteFloat
    retained: FiniteFloat | None
    mass: Annotated[list[Annotated[list[FiniteFloat], Many]], Many] | None
    error: FiniteFloat | None
    psnr: _Spread | None
    ssim: _Spread | None
    ms_ssim: _Spread | _Unavailable | None
    lpips: _Spread | _Unavailable | None
    over_random: _Difference | None
    quality: dict[str, FiniteFloat | _Unavailable] | None
    seconds: FiniteFloat
    speedup: FiniteFloat
    attention_speedup: FiniteFloat
    planning_share: FiniteFloat
    strip: Annotated[str, Field(pattern="^[A-Za-z0-9+/=]*$")]
    equal_to: list[str] = []

    @property
    def measured(self) -> set[str]:
        return {name for name, value in (self.quality or {}).items() if isinstance(value, float)}


class _Schedule(_Strict):
    dense_steps: int | float


class _Result(_Strict):
    model: str
    call: dict
    prompts: Annotated[list[str], Many]
    densities: Annotated[list[Density], Many]
    seeds: Annotated[int, Field(gt=0)]
    schedule: _Schedule
    executor: str
    grids: list[str]
    steps: Annotated[int, Field(gt=0)]
    device: str
    versions: dict[str, str | None]
    commit: str | None
    rows: Annotated[list[_Row], Many]
    finished: bool = True

    @model_validator(mode="after")
    def _alike(self) -> _Result:
        if "torch" not in self.versions:
            raise ValueError("versions name no torch")
        judged = [row for row in self.rows if row.quality]
        if any(row.measured != judged[0].measured for row in judged):
            raise ValueError("rows differ in the dimensions of their quality")
        return self


def read_result(path: Path) -> dict:
    """A ``compare.json``.

    Raises:
        ValueError: there is nothing, or something else; the message says what.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        _Result.model_validate(result)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        told = f"{place}: {first['msg']}" if place else first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{path} is no result of this version of dit-sparse compare: {told}") from None
    except (OSError, ValueError, RecursionError) as error:
        told = getattr(error, "strerror", None) or "it is no JSON"
        raise ValueError(f"{path} is no result of dit-sparse compare: {told}") from None
    return result
