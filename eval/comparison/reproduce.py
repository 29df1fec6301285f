"""Recipes that reproduce published results: a paper's setting and numbers, measured again as a comparison."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dit_sparse import Schedule
from dit_sparse.generation.model_config import pipeline_config
from dit_sparse.notation.reading import read_text

from .comparison import Comparison
from .result_schema import first_error
from .row_syntax import parse_row

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent / "recipes"
GENERATE_ARGUMENTS = {"self", "prompt", "generator", "output_type", "callback_on_step_end"}  # set by `generate`


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Published(_Strict):
    """One row of a paper's table.

    Attributes:
        row: the row of a `Comparison`: ``svg2@0.295``, ``radial@own``, ``profile:wan2.1-14b``, ``dense``.
        psnr: against the dense video, in dB.
        ssim, lpips: against the dense video.
        speedup: end-to-end speedup over dense attention. A comparison measures the denoising only.
    """

    row: str
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    speedup: float | None = None

    def method_and_density(self, default_density: float) -> tuple[str, float | None]:
        """Return method and density of the row; a row without a density has the default one.

        Raises:
            ValueError: the text specifies several rows or none.
        """
        if self.row == "all":
            raise ValueError("'all' is not a single row: write METHOD@DENSITY, METHOD@own, profile:NAME or dense")
        request = parse_row(self.row)
        return request.method, round(default_density, 4) if request.every_density else request.density


class Recipe(_Strict):
    """A paper's setting and results.

    Attributes:
        title: name of the table.
        source: where it was published.
        hardware: GPU of the published measurements.
        model: the bundled model, a local diffusers folder, or a name on the hub.
        call: arguments of the pipeline's call.
        density: of rows without a density, and of the random baseline.
        schedule: what stays dense.
        published: rows of the paper.
    """

    title: str
    source: str
    hardware: str
    model: str
    density: float = Field(gt=0, le=1)
    call: dict[str, int | float | str]
    schedule: Schedule = Schedule()
    published: tuple[Published, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_rows_differ(self) -> Recipe:
        texts: dict[tuple, str] = {}
        for published in self.published:
            row = published.method_and_density(self.density)
            if row in texts:
                raise ValueError(f"{texts[row]!r} and {published.row!r} are one row: leave one of them out")
            texts[row] = published.row
        return self

    @classmethod
    def load(cls, name: str | Path) -> Recipe:
        """Load a recipe by its name in ``recipes/``, or from a TOML file.

        Raises:
            ValueError: the recipe is missing or invalid.
        """
        path = Path(name) if Path(name).suffix == ".toml" else FOLDER / f"{name}.toml"
        try:
            if not os.path.isfile(path):
                raise ValueError(f"there is no recipe {str(name)[:60]!r}; there are {', '.join(recipes())}")
            return cls.model_validate(tomllib.loads(read_text(path)))
        except ValidationError as error:
            raise ValueError(f"{path}: {first_error(error)}") from None
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is not a TOML file: {error}") from None
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be used: {error}") from None

    def check_call(self) -> None:
        """Check ``call`` against the signature of the pipeline's class, without loading weights.

        Raises:
            ValueError: the pipeline is missing, or does not take an argument.
        """
        import diffusers

        class_name = pipeline_config(self.model)["_class_name"]
        pipeline = getattr(diffusers, str(class_name), None)
        if pipeline is None:
            return
        known = sorted({*inspect.signature(pipeline.__call__).parameters} - GENERATE_ARGUMENTS)
        if unknown := next((name for name in self.call if name not in known), None):
            raise ValueError(f"{class_name} takes no {unknown!r} under [call]; it takes {', '.join(known)}")

    def comparison(self, prompts: list[str], out: Path, seeds: int = 1, executor: str = "auto") -> Comparison:
        """Return the comparison of the published rows, with random blocks at the recipe's density."""
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
    """Return the names of the recipes in this package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def published_and_measured(recipe: Recipe, result: dict) -> Iterator[dict]:
    """Yield published and measured values by row: ``{"row": ..., "psnr": (published, measured), ...}``, or None.

    Only differences within one column are comparable: prompts, seeds and hardware differ, and published speedups are
    end-to-end, measured ones of the denoising. Rows that failed have no measured values.
    """
    measured = {(row["method"], row["density_asked"]): row for row in result["rows"] if row["steps"] == result["steps"]}
    mean = lambda statistics: (statistics or {}).get("mean")
    for published in recipe.published:
        name, density = published.method_and_density(recipe.density)
        row = measured.get((name, density), {})
        yield {
            "row": published.row,
            "density": (density, row.get("density_achieved")),
            **{key: (getattr(published, key), mean(row.get(key))) for key in ("psnr", "ssim", "lpips")},
            "speedup": (published.speedup, row.get("speedup")),
        }
