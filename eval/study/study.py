"""A study of methods on a model: the error of single steps for all rows and variants, and whole clips for the best.

`dit_sparse.eval.study.screening` explains why errors of attention or retained mass are not compared instead.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np

from dit_sparse import prepare
from dit_sparse.eval.comparison.clip_spec import ClipSpec, Sample
from dit_sparse.eval.comparison.clip_store import ClipRecord, ClipStore
from dit_sparse.eval.comparison.comparison import Comparison, Stage
from dit_sparse.eval.comparison.runner import ClipRunner
from dit_sparse.generation.generate import Progress
from dit_sparse.methods import method, name_of
from dit_sparse.output.files import atomic_write, save_json

from .ablation import variants
from .report import to_markdown
from .screening import Trajectory, record_trajectory, step_errors


@dataclass(frozen=True)
class Study:
    """Settings of a study. Results are stored row by row: the same study resumes where it was interrupted.

    Attributes:
        comparison: rows, prompts, seeds, schedule, model and folder; its rows include the variants.
        ablated: the method whose variants are rows, without a density; None: none.
        clips: whether the comparison of whole clips is run, too.
    """

    comparison: Comparison
    ablated: str | None = None
    clips: bool = False

    @classmethod
    def create(cls, methods: list[str], ablated: str | None, clips: bool, **settings: object) -> Study:
        """Make a study of ``methods`` and the variants of ``ablated``. Raises ValueError as `Comparison` does."""
        rows = [] if ablated is None else [ablated, *(one.method for one in variants(ablated))]
        name = None if ablated is None else name_of(method(ablated))
        return cls(Comparison(methods=[*methods, *rows], **settings), name, clips)

    def run(self, stage: Stage, runner_class: Callable[..., ClipRunner] = ClipRunner) -> dict:
        """Measure all rows and write ``study.json`` and ``study.md``.

        Args:
            stage: returns the progress callback of a named stage.
            runner_class: runs the work, in this process or on a cluster, as for `Comparison.run`.

        Returns:
            The content of ``study.json``: a row for each method and density, the most accurate first.
        """
        task, specs = self.comparison, [spec for spec in self.comparison.specs() if not spec.is_reference]
        with closing(task.make_runner(runner_class)) as runner:
            folder = (task.out / "screening").absolute()
            tasks = [partial(_measure, folder=folder, sample=sample, specs=specs) for sample in runner.samples]
            measured, measured_on = runner.run_tasks(tasks, stage("single steps")), runner.conditions()
        clips = self._compare_clips(stage, runner_class)
        rows = [_summarize(spec, [one[spec.name] for one in measured]) for spec in specs]
        rows = [row | {"psnr": clips.get(row["name"])} for row in sorted(rows, key=lambda row: row["error"])]
        settings = {key: value for key, value in asdict(task).items() if key not in ("out", "methods")}
        parts = [] if self.ablated is None else [asdict(one) for one in variants(self.ablated)]
        result = settings | measured_on | {"ablated": self.ablated, "variants": parts, "rows": rows}
        save_json(task.out / "study.json", result)
        with atomic_write(task.out / "study.md") as draft:
            draft.write_text(to_markdown(result))
        return result

    def _compare_clips(self, stage: Stage, runner_class: Callable[..., ClipRunner]) -> dict[str, float | None]:
        """Return the mean PSNR to the dense clips by row, if whole clips are compared."""
        if not self.clips:
            return {}
        rows = self.comparison.run(stage, runner_class)["rows"]
        return {row["name"]: row["psnr"] and row["psnr"]["mean"] for row in rows}


def _measure(
    runner: ClipRunner, progress: Progress, folder: Path, sample: Sample, specs: list[ClipSpec]
) -> dict[str, dict]:
    """Return the errors of all rows for one prompt and seed; the dense clip is generated if a row is missing."""
    store, measured = ClipStore(folder), {}
    dense: Trajectory | None = None
    for number, spec in enumerate(specs):
        key = runner.key(spec, sample)
        stored = store.get(*key)
        if stored is None:
            pipe = prepare(runner.pipe)
            dense = dense or record_trajectory(pipe, *sample, runner.call)
            errors = step_errors(pipe, spec.processor, *sample, runner.call, dense)
            stored = ClipRecord(np.empty(0), errors)
            store.put(*key, stored)
        measured[spec.name] = stored.metadata
        progress(number + 1, len(specs))
    return measured


def _summarize(spec: ClipSpec, runs: list[dict]) -> dict:
    """Return one row: root mean square of the errors over steps and clips, the mean by step, and the costs."""
    by_step = np.sqrt(np.square([run["errors"] for run in runs]).mean(0))
    mean = lambda name: fmean(run[name] or 0.0 for run in runs)
    names = ("density_achieved", "density_run", "tail_density", "attention_seconds", "planning_seconds")
    row = {"name": spec.name, "method": spec.method, "density": spec.density}
    row |= {"error": float(np.sqrt(np.square(by_step).mean())), "steps": runs[0]["steps"], "errors": by_step.tolist()}
    return row | {name: mean(name) for name in names}
