"""What papers published, measured again: a recipe holds their setting and their numbers, and becomes a comparison."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dit_sparse import Schedule
from dit_sparse.bundled import model_source

from .comparison import Comparison

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent / "recipes"
OURS = {"self", "prompt", "generator", "output_type", "callback_on_step_end"}  # arguments that `generate` gives


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Published(_Strict):
    """One row of a paper's table.

    Attributes:
        row: what to compare, as `Comparison` takes it: ``svg2@0.295``, ``radial@own``, ``profile:wan2.1-14b``.
        psnr, ssim, lpips: against the dense video, dB and fractions.
        speedup: of the whole generation over dense, as papers tell it; here the denoising alone is measured.
    """

    row: str
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    speedup: float | None = None

    def wanted(self, usual: float) -> tuple[str, float | None]:
        """Method and density of the row; ``usual`` is that of rows that name none.

        Raises:
            ValueError: no single row that could be measured is meant.
        """
        name, at, density = self.row.partition("@")
        own = name == "dense" or name.startswith("profile:")
        if name == "all" or (own and at):
            raise ValueError(f"{self.row!r} is no single row: write METHOD@DENSITY, METHOD@own, profile:NAME or dense")
        if own or (at and density in ("", "own")):
            return name, None
        try:
            return name, round(float(density) if at else usual, 4)  # as `Comparison` does
        except ValueError:
            raise ValueError(f"{self.row!r}: write METHOD@DENSITY, such as svg@0.3, or METHOD@own") from None


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

    @model_validator(mode="after")
    def _rows_differ(self) -> Recipe:
        seen: dict[tuple, str] = {}
        for one in self.published:
            wanted = one.wanted(self.density)
            if wanted in seen:
                raise ValueError(f"{seen[wanted]!r} and {one.row!r} are one row; leave one of them out")
            seen[wanted] = one.row
        return self

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
            told = [path, ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")]
            raise ValueError(": ".join(str(part) for part in told if part)) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no TOML file: {error}") from None

    def check_call(self) -> None:
        """Whether the pipeline takes what ``call`` gives, by its class alone: no weights are loaded.

        Raises:
            ValueError: it does not, or there is no such pipeline.
        """
        import diffusers

        try:
            kind = diffusers.DiffusionPipeline.load_config(model_source(self.model))["_class_name"]
        except (OSError, KeyError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"cannot load the model {self.model}: {reason}") from None
        pipeline = getattr(diffusers, str(kind), None)
        known = self.call if pipeline is None else sorted({*inspect.signature(pipeline.__call__).parameters} - OURS)
        if wrong := next((name for name in self.call if name not in known), None):
            raise ValueError(f"{kind} takes no {wrong!r} under [call]; it takes {', '.join(known)}")

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
    has none. Only differences within one column say something: prompts, seeds and machines are others, and of the
    speed-ups the published ones are of whole generations, the measured ones of the denoising."""
    measured = {(row["method"], row["density_asked"]): row for row in result["rows"] if row["steps"] == result["steps"]}
    mean = lambda spread: (spread or {}).get("mean")
    for published in recipe.published:
        name, density = published.wanted(recipe.density)
        row = measured[name, density]
        yield {
            "row": published.row,
            "density": (density, row["density_achieved"]),
            **{key: (getattr(published, key), mean(row[key])) for key in ("psnr", "ssim", "lpips")},
            "speedup": (published.speedup, row["speedup"]),
        }
