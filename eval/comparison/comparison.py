"""Methods side by side: the same prompts, seeds, schedule and executor for all, at one density or several.

Dense attention is always there, and random blocks at every density. So is dense attention with fewer steps: what a
density buys has to beat what leaving out steps buys. With r the fraction of the pairs that the whole run of a row was
measured to compute and a the share of attention in the dense time, the row costs as much as steps * (1 - a * (1 - r))
dense steps (after "The Sparse Frontier", arXiv:2504.17768, sec. 3, which compares at equal cost). There is a dense row
for every rounded number that is below the full one; a sparse row that rounds to the full one has none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dit_sparse import METHODS, Schedule, SparseAttnProcessor
from dit_sparse.budget import check_density
from dit_sparse.bundled import BUNDLED
from dit_sparse.generation.generate import Progress, usual_call
from dit_sparse.methods import method
from dit_sparse.output.environment import conditions
from dit_sparse.output.files import save_json, writable_folder

from .runner import ClipRunner, ClipSpec, check_steps
from .summary import density_of, near, over_random, summary

ALWAYS = ("dense", "random_blocks")  # the ceiling and the floor of every comparison
QUICK_CALL = {"num_inference_steps": 6, "num_frames": 4, "height": 64, "width": 64}  # of the bundled model
Stage = Callable[[str], Progress]


@dataclass(frozen=True)
class Comparison:
    """What is compared; everything is checked before any long work.

    Attributes:
        methods: names of ``dit-sparse methods``, compositions such as ``radial|sink``, ``profile:NAME``, or ``svg@0.3``
            for a single row at a density of its own, ``radial@own`` for one at the method's own settings.
        prompts: one clip each, seed and row.
        out: folder for ``compare.json`` and the clips. A comparison that was killed takes up the clips it finds there,
            and so does a larger one. While a finished ``compare.json`` is there, a new one is written to
            ``compare.unfinished.json`` and replaces it at its end.
        densities: a row of every method for each, to four digits. A profile has a density of its own.
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
        if duplicate := next((one for one in self.prompts if list(self.prompts).count(one) > 1), None):
            raise ValueError(
                f"the prompt {duplicate!r} is given twice; for several clips of a prompt, ask for more seeds"
            )
        if self.seeds < 1:
            raise ValueError(f"seeds is how many clips there are of a prompt, at least 1, not {self.seeds}")
        if not self.densities:
            raise ValueError("there is no density to compare methods at")
        names = [name for given in self.methods for name in (METHODS if given == "all" else (given,))]
        object.__setattr__(self, "methods", list(dict.fromkeys([*ALWAYS, *names])))
        object.__setattr__(self, "densities", sorted({_checked(density) for density in self.densities}))
        object.__setattr__(self, "call", usual_call(self.model, small=True) | self.call)
        if "num_inference_steps" in self.call:
            check_steps(self.schedule, self.call["num_inference_steps"])
        self.rows()
        writable_folder(self.out)

    def rows(self) -> list[ClipSpec]:
        """Every row but those that depend on what these are measured to be."""
        alone, everywhere = [], []
        for given in self.methods[1:]:
            name, at, density = given.partition("@")
            if at or given.startswith("profile:"):
                alone.append(self._wanted(given, name, _own_density(given, density)))
            else:
                everywhere.append(given)
        rows = [self._wanted(given, given, density) for density in self.densities for given in everywhere]
        floors = self._floors([row.density for row in alone if row.density], list(self.densities))
        once: dict[tuple, ClipSpec] = {}
        for row in (self._wanted("dense", "dense", None), *rows, *floors, *alone):
            once.setdefault((row.method, row.density), row)
        return list(once.values())

    def _floors(self, densities: Sequence[float], there: Sequence[float]) -> list[ClipSpec]:
        """Random blocks at every density that is near none of those that are there, to four digits."""
        added: list[float] = []
        for density in densities:
            if not any(near(density, other) for other in (*there, *added)):
                added.append(round(density, 4))
        return [self._wanted("random_blocks", "random_blocks", density) for density in added]

    def _wanted(self, given: str, name: str, density: float | None) -> ClipSpec:
        return ClipSpec(given, name, density, self.processor(name, density))

    def processor(self, name: str, density: float | None) -> SparseAttnProcessor:
        """Nothing stays dense for its length: methods are compared, not whether they pay."""
        given = {"schedule": self.schedule, "executor": self.executor, "block": self.block, "min_tokens": 0}
        if name.startswith("profile:"):
            return SparseAttnProcessor.from_profile(name.removeprefix("profile:"), **given)
        one = method(name) if density is None else method(name, density=density)
        return SparseAttnProcessor(one, **given)

    def run(self, stage: Stage) -> dict:
        """All clips, then one row after the other; what is not finished is told so in the file that is there after each
        of them. Returns what was written at the end."""
        same = {"schedule": self.schedule, "executor": self.executor, "block": self.block}
        studio = ClipRunner(self.model, self.prompts, range(self.seeds), self.call, self.out / "clips", **same)
        path = self.out / "compare.json"
        draft = path.with_name("compare.unfinished.json") if _finished(path) else path
        result = {key: value for key, value in asdict(self).items() if key not in ("out", "methods")}
        result |= {"finished": False, "grids": [], "steps": None} | conditions() | {"rows": []}
        errors: dict = {}
        for name, rows in self._in_turn(result["rows"]):
            studio.make(rows, stage(name))
            judging = stage(f"{name}: figures")
            for done, wanted in enumerate(rows):
                judging(done, len(rows))
                if wanted.density not in errors and wanted.steps is None:
                    alike = [row for row in rows if row.density == wanted.density]
                    errors[wanted.density] = studio.errors(alike, stage(f"errors at {wanted.density or 'own density'}"))
                row = summary(wanted, studio, self.quality) | {"error": errors[wanted.density].get(wanted.method)}
                result["grids"], result["steps"] = row.pop("grids") or result["grids"], result["steps"] or row["steps"]
                result["rows"].append(row)
                for one in result["rows"]:
                    one["over_random"] = over_random(one, result["rows"], self.seeds)
                save_json(draft, result)
            judging(len(rows), len(rows))
        result["finished"] = True
        save_json(path, result)
        if draft != path:
            draft.unlink()
        return result

    def _in_turn(self, made: list[dict]) -> Iterator[tuple[str, list[ClipSpec]]]:
        """The rows, random blocks where the own settings of a method led, and dense attention with as many steps as
        rows cost; each with a name, where there are any. ``made``: what came of those before."""
        yield "clips", self.rows()
        there = [density_of(row) for row in made if row["method"] == "random_blocks"]
        if floors := self._floors(list(filter(None, map(density_of, made))), list(filter(None, there))):
            yield "random blocks", floors
        equal: dict[int, list[str]] = {}
        for row in made[1:]:
            equal.setdefault(equal_steps(row, made[0]), []).append(row["name"])
        dense = lambda steps: ClipSpec(
            "dense", "dense", None, self.processor("dense", None), steps, tuple(equal[steps])
        )
        if fewer := sorted(equal.keys() - {made[0]["steps"]}):
            yield "dense, fewer steps", [dense(steps) for steps in fewer]


def equal_steps(row: dict, dense: dict) -> int:
    """How many dense steps cost as much as a row."""
    attention, steps = dense["attention_seconds"] / dense["seconds"], dense["steps"]
    return min(max(1, round(steps * (1 - attention * (1 - row["density_run"])))), steps)


def _finished(path: Path) -> bool:
    try:
        return json.loads(path.read_text()).get("finished", True)
    except (OSError, ValueError, AttributeError):
        return False


def _checked(density: float) -> float:
    return check_density(round(check_density(density), 4))


def _own_density(given: str, text: str) -> float | None:
    if given.startswith("dense@"):
        raise ValueError(f"{given!r}: dense attention computes all pairs, it has no density of its own")
    if text in ("", "own"):
        return None
    try:
        density = float(text)
    except ValueError:
        raise ValueError(f"{given!r}: write METHOD@DENSITY, such as svg@0.3, or METHOD@own") from None
    return _checked(density)
