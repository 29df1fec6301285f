"""Methods side by side: the same prompts, seeds, schedule and executor for all, at one density or several.

Dense attention and random blocks are always there, and so is dense attention with fewer steps: what a density buys has
to beat what leaving out steps buys. With r the fraction of the pairs that a whole run computes and a the share of
attention in the dense time, such a row has steps * (1 - a * (1 - r)) steps (after "The Sparse Frontier",
arXiv:2504.17768, sec. 3, which compares at equal cost).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dit_sparse import METHODS, Schedule, SparseAttnProcessor
from dit_sparse.budget import check_density
from dit_sparse.methods import method

from .environment import conditions
from .files import save_json, writable_folder
from .generate import BUNDLED, BUNDLED_CALL, Progress
from .summary import summary
from .takes import Studio, Wanted

ALWAYS = ("dense", "random_blocks")  # the ceiling and the floor of every comparison
SMALL_CALL = {"num_inference_steps": 8, "num_frames": 7, "height": 64, "width": 64}  # of the bundled model
QUICK_CALL = SMALL_CALL | {"num_inference_steps": 6, "num_frames": 4}
Stage = Callable[[str], Progress]


@dataclass(frozen=True)
class Comparison:
    """What is compared; everything is checked before any long work.

    Attributes:
        methods: names of ``dit-sparse methods``, compositions such as ``radial|sink``, ``profile:NAME``, or ``svg@0.3``
            for a single row at a density of its own, ``radial@own`` for one at the method's own settings.
        prompts: one clip each, seed and row.
        out: folder for ``compare.json`` and the clips. A comparison that was killed takes up the clips it finds there.
        densities: a row of every method for each. A profile has a density of its own.
        seeds: how many, 0, 1, ...
        schedule, executor, block: the same for all.
        quality: also judge every clip by itself (`quality`): some seconds a clip, more for large ones.
        model, call: the pipeline, and the arguments of its call.
    """

    methods: Sequence[str]
    prompts: Sequence[str]
    out: Path
    densities: Sequence[float] = (0.25,)
    seeds: int = 1
    schedule: Schedule = Schedule()  # noqa: RUF009
    executor: str = "auto"
    block: int | None = None
    quality: bool = False
    model: str = BUNDLED
    call: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("there are no prompts to compare methods on")
        if self.seeds < 1:
            raise ValueError(f"seeds is how many clips there are of a prompt, at least 1, not {self.seeds}")
        if not self.densities:
            raise ValueError("there is no density to compare methods at")
        for density in self.densities:
            check_density(density)
        names = [name for given in self.methods for name in (METHODS if given == "all" else (given,))]
        object.__setattr__(self, "methods", list(dict.fromkeys([*ALWAYS, *names])))
        object.__setattr__(self, "densities", sorted(set(self.densities)))
        usual = BUNDLED_CALL | SMALL_CALL if self.model == BUNDLED else {}
        object.__setattr__(self, "call", usual | self.call)
        self.rows()
        writable_folder(self.out)

    def rows(self) -> list[Wanted]:
        """Every row but those with fewer steps, whose number depends on what the dense clips cost."""
        alone, everywhere = [], []
        for given in self.methods[1:]:
            name, at, density = given.partition("@")
            if at or given.startswith("profile:"):
                alone.append(self._wanted(given, name, _own_density(given, density)))
            else:
                everywhere.append(given)
        rows = [self._wanted(given, given, density) for density in self.densities for given in everywhere]
        once: dict[tuple, Wanted] = {}
        for row in (self._wanted("dense", "dense", None), *rows, *alone):
            once.setdefault((row.method, row.density), row)
        return list(once.values())

    def _wanted(self, given: str, name: str, density: float | None) -> Wanted:
        return Wanted(given, name, density, self.processor(name, density))

    def processor(self, name: str, density: float | None) -> SparseAttnProcessor:
        """Nothing stays dense for its length: methods are compared, not whether they pay."""
        given = {"schedule": self.schedule, "executor": self.executor, "block": self.block, "min_tokens": 0}
        if name.startswith("profile:"):
            return SparseAttnProcessor.from_profile(name.removeprefix("profile:"), **given)
        one = method(name) if density is None else method(name, density=density)
        return SparseAttnProcessor(one, **given)

    def run(self, stage: Stage) -> dict:
        """One row after the other, written to ``compare.json`` after each of them; returns what was written."""
        studio = Studio(self.model, self.prompts, range(self.seeds), self.call, self.out / "clips")
        rows, everything = self.rows(), stage("all rows")
        result = {key: value for key, value in asdict(self).items() if key not in ("out", "methods")}
        result |= {"grids": [], "steps": None} | conditions() | {"rows": []}
        errors: dict = {}
        for done, wanted in enumerate(self._in_turn(rows, studio)):
            everything(done, len(rows) + len(self.densities))
            if wanted.density not in errors and wanted.steps is None:
                alike = [row for row in rows if row.density == wanted.density]
                errors[wanted.density] = studio.errors(alike, self.schedule, self.block, stage("errors"))
            studio.make(wanted, stage(wanted.name))
            made = summary(wanted, studio, result["rows"], self.quality)
            made["error"] = errors[wanted.density].get(wanted.method)
            result["grids"], result["steps"] = made.pop("grids") or result["grids"], result["steps"] or made["steps"]
            result["rows"].append(made)
            save_json(self.out / "compare.json", result)
        everything(1, 1)
        return result

    def _in_turn(self, rows: list[Wanted], studio: Studio) -> Iterator[Wanted]:
        """The rows, and dense attention with as many steps as each density pays for."""
        yield from rows
        dense = studio.dense_note()
        costs = {self._steps_of_equal_cost(density, dense) for density in self.densities}
        for steps in sorted(costs - {dense["steps"]}):
            yield Wanted("dense", "dense", None, self.processor("dense", None), steps)

    def _steps_of_equal_cost(self, density: float, dense: dict) -> int:
        steps = dense["steps"]
        sparse = 1 - self.schedule.first_sparse_step(steps) / steps
        attention = dense["attention_seconds"] / dense["seconds"]
        return max(1, round(steps * (1 - attention * sparse * (1 - density))))


def _own_density(given: str, text: str) -> float | None:
    if text in ("", "own"):
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{given!r}: write METHOD@DENSITY, such as svg@0.3, or METHOD@own") from None
