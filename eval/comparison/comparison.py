"""Comparison of methods: the same prompts, seeds, schedule and executor for all, at one density or several.

Every comparison has two baselines, dense attention and random blocks at every density. A third is dense attention with
fewer steps, because a sparse method must beat a shorter schedule of the same cost. With r the fraction of pairs that
the whole run of a row computes and a the share of attention in the dense time, a row costs as much as
steps * (1 - a * (1 - r)) dense steps (after "The Sparse Frontier", arXiv:2504.17768, sec. 3, which compares at equal
cost). There is a dense row for every rounded number of steps below the full one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from dit_sparse import METHODS, Schedule, SparseAttnProcessor
from dit_sparse.bundled import BUNDLED
from dit_sparse.eval.quality.measures import FAST, select_measures
from dit_sparse.generation.checks import check_clip
from dit_sparse.generation.generate import Progress, default_call
from dit_sparse.methods import KINDS, kind_of, method
from dit_sparse.notation.parser import parse
from dit_sparse.notation.syntax import has_settings
from dit_sparse.output.files import save_json, writable_folder

from .clip_spec import DENSE_SPEC, ClipSpec
from .row_syntax import parse_row, round_density
from .runner import ClipRunner, check_steps
from .summary import gain_over_random, is_same_density, row_density, summarize_row

BASELINES = ("dense", "random_blocks")
QUICK_CALL = {"num_inference_steps": 6, "num_frames": 4, "height": 64, "width": 64}  # for the bundled model
Stage = Callable[[str], Progress]


@dataclass(frozen=True)
class Comparison:
    """Settings of a comparison. Everything is checked at construction.

    Attributes:
        methods: rows: methods as text, such as ``radial(sink=true)``, ``radial|sink`` or ``profile:NAME``, or ``all``;
            ``svg@0.3`` is a single row at this density, ``radial@own`` one at the method's own settings.
        kinds: the kinds of methods that ``all`` stands for; empty: every kind.
        prompts: every row has a clip for each prompt and seed.
        out: folder for ``compare.json`` and the clips. An interrupted comparison resumes from the clips in it, and a
            larger comparison reuses them. If a finished ``compare.json`` is there, the new one is written to
            ``compare.unfinished.json`` and replaces it at the end.
        densities: every method has a row for each, rounded to four digits. A profile has a density of its own.
        seeds: number of seeds, ``first_seed``, ``first_seed + 1``, ...
        schedule, executor, block: settings of all rows.
        quality: also score every clip by `quality`, which takes seconds per clip, more for large ones.
        measures: measures of fidelity, keys of `MEASURES`, or ``all``; PSNR and SSIM are always computed. Default: all
            that are not slow.
        model: the bundled model, a local diffusers folder, or a name on the hub.
        call: arguments of the pipeline's call.

    Raises:
        ValueError: a value is unknown or out of range, or ``out`` is not writable.
    """

    methods: Sequence[str]
    prompts: Sequence[str]
    out: Path
    kinds: Sequence[str] = ()
    densities: Sequence[float] = (0.25,)
    seeds: int = 1
    first_seed: int = 0
    schedule: Schedule = Schedule()  # noqa: RUF009
    executor: str = "auto"
    block: int | None = None
    quality: bool = False
    measures: Sequence[str] = FAST
    model: str = BUNDLED
    call: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("no prompts given: name at least one")
        if duplicate := next((one for one in self.prompts if list(self.prompts).count(one) > 1), None):
            raise ValueError(f"the prompt {duplicate!r} is given twice: for several clips of a prompt, use more seeds")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        if self.first_seed < 0:
            raise ValueError(f"the first seed must be at least 0, got {self.first_seed}")
        if not self.densities:
            raise ValueError("no density given: name at least one")
        if self.kinds and "all" not in self.methods:
            raise ValueError("kinds select from all methods: add all to the methods")
        if unknown := next((kind for kind in self.kinds if kind not in KINDS), None):
            raise ValueError(f"there is no kind {unknown[:60]!r}; there are {', '.join(KINDS)}")
        chosen = [name for name in METHODS if not self.kinds or kind_of(name) in self.kinds]
        names = [name for text in self.methods for name in (chosen if text == "all" else (text,))]
        object.__setattr__(self, "methods", list(dict.fromkeys([*BASELINES, *names])))
        object.__setattr__(self, "measures", select_measures(self.measures))
        object.__setattr__(self, "densities", sorted({round_density(density) for density in self.densities}))
        object.__setattr__(self, "call", default_call(self.model, small=True) | self.call)
        if "num_inference_steps" in self.call:
            check_steps(self.schedule, self.call["num_inference_steps"])
        self.specs()
        for prompt in self.prompts:
            check_clip(prompt, self.first_seed + self.seeds, self.call, model=self.model)
        writable_folder(self.out, ("compare.json", "report.html"))

    def specs(self) -> list[ClipSpec]:
        """Return the rows that are known in advance: dense attention, requested rows and their random baselines."""
        requests = [parse_row(text) for text in self.methods[1:]]
        single = [self._spec(one.text, one.method, one.density) for one in requests if not one.every_density]
        rows = [
            self._spec(one.text, one.method, density)
            for density in self.densities
            for one in requests
            if one.every_density
        ]
        baselines = self._random_baselines([row.density for row in single if row.density], self.densities)
        unique: dict[tuple, ClipSpec] = {}
        for row in (self._spec("dense", "dense", None), *rows, *baselines, *single):
            unique.setdefault((row.method, row.density), row)
        return list(unique.values())

    def _random_baselines(self, densities: Sequence[float], present: Sequence[float]) -> list[ClipSpec]:
        """Return random blocks at every density that is not present."""
        added: list[float] = []
        for density in densities:
            if not any(is_same_density(density, other) for other in (*present, *added)):
                added.append(round(density, 4))
        return [self._spec("random_blocks", "random_blocks", density) for density in added]

    def _spec(self, text: str, name: str, density: float | None) -> ClipSpec:
        return ClipSpec(text, name, density, self.processor(name, density))

    def processor(self, name: str, density: float | None) -> SparseAttnProcessor:
        """Return the processor of a row. ``min_tokens=0``, so that short sequences are sparse as well."""
        settings = {"schedule": self.schedule, "executor": self.executor, "block": self.block, "min_tokens": 0}
        if density is None and not has_settings(parse(name)):  # a name alone would get the default density
            return SparseAttnProcessor(method(name), **settings)
        return SparseAttnProcessor(name, density=density, **settings)

    def make_runner(self, runner_class: Callable[..., ClipRunner] = ClipRunner) -> ClipRunner:
        """Return a runner of the clips of this comparison."""
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        settings = (self.schedule, self.executor, self.block)
        return runner_class(self.model, self.prompts, seeds, self.call, self.out / "clips", *settings)

    def run(self, stage: Stage, runner_class: Callable[..., ClipRunner] = ClipRunner) -> dict:
        """Generate all clips and summarize the rows; the file is written after every row.

        A row that fails is listed under ``failures``, and the other rows are completed. The next run tries it again.

        Args:
            stage: returns the progress callback of a named stage.
            runner_class: generates the clips: in this process, or on a cluster, see
                `dit_sparse.eval.comparison.ray_runner.runner_class`.

        Returns:
            The content of ``compare.json``.
        """
        with closing(self.make_runner(runner_class)) as runner:
            return self._run(runner, stage)

    def _run(self, runner: ClipRunner, stage: Stage) -> dict:
        path = self.out / "compare.json"
        draft = path.with_name("compare.unfinished.json") if _is_finished(path) else path
        result = {key: value for key, value in asdict(self).items() if key not in ("out", "methods")}
        result |= {"finished": False, "grids": [], "steps": None} | runner.conditions() | {"failures": [], "rows": []}
        errors: dict[float | None, dict[str, float]] = {}
        for name, specs in self._row_groups(result["rows"]):
            failed = runner.generate_missing(specs, stage(f"{name} ({runner.progress_unit})"))
            result["failures"] += [{"name": row, "error": error} for row, error in failed.items()]
            specs = [spec for spec in specs if spec.name not in failed]
            self._measure_errors(specs, runner, errors, stage)
            progress = stage(f"{name}: metrics")
            for number, spec in enumerate(specs):
                progress(number, len(specs))
                row = summarize_row(spec, runner, self.quality, self.measures)
                row["error"] = errors[spec.density].get(spec.method)
                self._add_row(row, result)
                save_json(draft, result)
            progress(len(specs), len(specs))
        result["finished"] = True
        save_json(path, result)
        if draft != path:
            draft.unlink()
        return result

    def _measure_errors(self, specs: Sequence[ClipSpec], runner: ClipRunner, errors: dict, stage: Stage) -> None:
        """Add the attention errors of all methods at each new density."""
        for density in dict.fromkeys(spec.density for spec in specs if spec.steps is None):
            if density not in errors:
                alike = [spec for spec in specs if spec.density == density]
                setting = "own settings" if density is None else f"density {density:g}"
                errors[density] = runner.attention_errors(alike, stage(f"output error at {setting}"))

    def _add_row(self, row: dict, result: dict) -> None:
        result["grids"] = row.pop("grids") or result["grids"]
        result["steps"] = result["steps"] or row["steps"]
        result["rows"].append(row)
        for one in result["rows"]:
            one["over_random"] = gain_over_random(one, result["rows"], self.seeds)

    def _row_groups(self, rows: list[dict]) -> Iterator[tuple[str, list[ClipSpec]]]:
        """Yield the rows in groups, each with a name; later groups depend on the summaries of earlier ones.

        Args:
            rows: summaries of the groups so far; the caller appends to it.
        """
        yield "rows", self.specs()
        present = [row_density(row) for row in rows if row["method"] == "random_blocks"]
        densities = list(filter(None, map(row_density, rows)))
        if baselines := self._random_baselines(densities, list(filter(None, present))):
            yield "random blocks", baselines
        names_by_steps: dict[int, list[str]] = {}
        for row in rows[1:]:
            names_by_steps.setdefault(steps_of_equal_cost(row, rows[0]), []).append(row["name"])
        names_by_steps.pop(rows[0]["steps"], None)
        dense = replace(DENSE_SPEC, processor=self.processor("dense", None))
        fewer_steps = [replace(dense, steps=n, equal_to=tuple(names)) for n, names in sorted(names_by_steps.items())]
        if fewer_steps:
            yield "dense, fewer steps", fewer_steps


def steps_of_equal_cost(row: dict, dense: dict) -> int:
    """Return how many dense steps cost as much as a row, at least 1 and at most those of the dense row."""
    attention_share, steps = dense["attention_seconds"] / dense["seconds"], dense["steps"]
    return min(max(1, round(steps * (1 - attention_share * (1 - row["density_run"])))), steps)


def _is_finished(path: Path) -> bool:
    try:
        return json.loads(path.read_text()).get("finished", True)
    except (OSError, ValueError, AttributeError):
        return False
