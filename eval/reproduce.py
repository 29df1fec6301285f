"""What papers published, measured again: a recipe holds their setting and their numbers, and becomes a comparison."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dit_sparse import Schedule

from .compare import Comparison

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent / "recipes"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Published(_Strict):
    """One row of a paper's table.

    Attributes:
        row: what to compare, as `Comparison` takes it: ``svg2@0.295``, ``radial@own``, ``profile:wan2.1-14b``.
        psnr, ssim, lpips: against the dense video, dB and fractions.
        speedup: of the whole generation over dense.
    """

    row: str
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    speedup: float | None = None


class Recipe(_Strict):
    """A paper's setting.

    Attributes:
        title, source, hardware: what, where it was published, on which GPU it was measured there.
        model, call: the pipeline, and the arguments of its call.
        density: of the rows that are compared beside the published ones.
        schedule: what stays dense.
        published: the paper's rows.
    """

    title: str
    source: str
    hardware: str
    model: str
    density: float = Field(gt=0, le=1)
    call: dict[str, int | float | str]
    schedule: Schedule = Schedule()
    published: tuple[Published, ...] = Field(min_length=1)

    @classmethod
    def load(cls, name: str | Path) -> Recipe:
        """One of ``eval/recipes/`` by name, or a file.

        Raises:
            ValueError: it is not there, or something in it is wrong; the message says what.
        """
        path = Path(name) if Path(name).suffix == ".toml" else FOLDER / f"{name}.toml"
        try:
            return cls.model_validate(tomllib.loads(path.read_text()))
        except OSError:
            raise ValueError(f"there is no recipe {str(name)!r}; there are {', '.join(recipes())}") from None
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ValueError(f"{path}: {place}: {first['msg']}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no TOML file: {error}") from None

    def comparison(self, prompts: list[str], out: Path, seeds: int = 1, executor: str = "auto") -> Comparison:
        """The published rows and, at one density, random blocks."""
        return Comparison(
            methods=[published.row for published in self.published],
            prompts=prompts,
            out=out,
            densities=(self.density,),
            seeds=seeds,
            schedule=self.schedule,
            executor=executor,
            model=self.model,
            call=dict(self.call),
        )


def recipes() -> list[str]:
    """Names of the recipes that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def beside(recipe: Recipe, result: dict) -> Iterator[dict]:
    """Published and measured, row by row: ``{"row": ..., "psnr": (published, measured), ...}``, None where either side
    has none. Only differences within one column say something: prompts, seeds and machines are others."""
    measured = {row["given"]: row for row in result["rows"]}
    for published in recipe.published:
        row = measured[published.row]
        yield {
            "row": published.row,
            "density": (None, row["density_achieved"]),
            "psnr": (published.psnr, row["psnr"]["mean"]),
            "ssim": (published.ssim, row["ssim"]["mean"]),
            "lpips": (published.lpips, row["lpips"]["mean"] if "mean" in (row["lpips"] or {}) else None),
            "speedup": (published.speedup, row["speedup"]),
        }
