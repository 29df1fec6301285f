"""Making the clips of a comparison: what is on the shelf already is not made again."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_sparse import Schedule, Site, SparseAttnProcessor, prepare
from dit_sparse.bundled import BUNDLED
from dit_sparse.composition import nested_methods
from dit_sparse.engine.report import Stopwatch
from dit_sparse.eval.analysis import retained_mass
from dit_sparse.eval.quality.fidelity import relative_error
from dit_sparse.generation.generate import Progress, generate, load
from dit_sparse.methods.dense import Dense
from dit_sparse.methods.rettention import Rettention
from dit_sparse.output.environment import device_name, sources, versions, weights
from dit_sparse.profiling import probe
from dit_sparse.profiling.candidates import Candidate

from .clip_store import ClipRecord, ClipStore

LATENTS = 9  # steps after which the latents of a dense clip are kept, to see how others depart from them
EVERY = 8  # of the calls of a layer, one is looked at for what its plan retains


@dataclass(frozen=True)
class ClipSpec:
    """One row: a method at a density, or dense attention with fewer steps than the others have.

    Attributes:
        given: how it was asked for.
        method: its name.
        density: None for dense attention and for profiles.
        processor: how it is set up.
        steps: None: as many as the others.
        equal_to: names of the rows that cost as much as so many steps.
    """

    given: str
    method: str
    density: float | None
    processor: SparseAttnProcessor
    steps: int | None = None
    equal_to: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        if self.steps is not None:
            return f"{self.method}, {self.steps} steps"
        return self.method if self.density is None else f"{self.method} {self.density:g}"


class ClipRunner:
    """Takes of every row, for all prompts and seeds. The pipeline is loaded when the first take is missing; one of the
    hub at once, for only then it is known which commit it is.

    ``schedule``, ``executor`` and ``block`` are those of all rows."""

    def __init__(
        self,
        model: str,
        prompts: Sequence[str],
        seeds: Sequence[int],
        call: dict,
        folder: Path,
        schedule: Schedule,
        executor: str = "auto",
        block: int | None = None,
    ) -> None:
        self.model, self.call, self.shelf = model, call, ClipStore(folder)
        self.schedule, self.executor, self.block = schedule, executor, block
        self.scenes = [(prompt, seed) for prompt in prompts for seed in seeds]
        self.seeds = len(seeds)

    @cached_property
    def pipe(self) -> Any:
        pipe = load(self.model)
        usual = inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
        check_steps(self.schedule, self.call.get("num_inference_steps", usual))
        return prepare(pipe)

    def make(self, rows: Sequence[ClipSpec], progress: Progress) -> None:
        """Make the takes that are missing, scene after scene and in each of them row after row: what slows the machine
        for some minutes slows all rows alike. ``progress`` counts takes, and steps as parts of them."""
        todo, warm = [(scene, wanted) for scene in self.scenes for wanted in rows], set()
        for number, (scene, wanted) in enumerate(todo):
            if self.shelf.get(*self._key(wanted, scene)) is None:
                if wanted.name not in warm:
                    self._warm_up(wanted)
                    warm.add(wanted.name)
                told = lambda step, steps, n=number: progress(n * steps + step, len(todo) * steps)
                self.shelf.put(*self._key(wanted, scene), self._take(wanted, scene, told))
            progress(number + 1, len(todo))

    def takes(self, wanted: ClipSpec) -> Iterator[tuple[ClipRecord, ClipRecord]]:
        """Every take of a row that was made, and the dense one of its prompt and seed."""
        for scene in self.scenes:
            take, dense = (self.shelf.get(*self._key(row, scene)) for row in (wanted, self._dense))
            yield take, dense

    def errors(self, rows: list[ClipSpec], progress: Progress) -> dict[str, float]:
        """Relative error of the attention output of each method, by the calls of one dense clip: what no later step
        can blur. A method that lives on what it saw of dense steps is not judged so."""
        lives_on_steps = lambda one: any(isinstance(part, Dense | Rettention) for part in nested_methods(one))
        judged = {row.method: row.processor.settings.method for row in rows}
        judged = {name: one for name, one in judged.items() if not lives_on_steps(one)}
        settings = {name: one.settings() for name, one in judged.items()}
        if not judged:
            return {}
        (prompt, seed), schedule = self.scenes[0], asdict(self.schedule)
        decides = self._same | {"call": self.call, "prompt": prompt, "seed": seed, "methods": settings}
        decides |= {"schedule": schedule, "executor": self.executor, "block": self.block}
        place = "errors", decides
        if (found := self.shelf.get(*place)) is None:
            tried = [Candidate(*pair) for pair in judged.items()]
            clip = lambda: generate(self.pipe, prompt, seed, self.call, progress)
            measurements = probe.measure_candidates(self.pipe, clip, tried, self.schedule, self.block)
            error = measurements.error.mean((1, 2)).sqrt()
            found = ClipRecord(np.empty(0), dict(zip(judged, error.tolist(), strict=True)))
            self.shelf.put(*place, found)
        return found.note

    @cached_property
    def _same(self) -> dict:
        """What decides every take."""
        if self.model != BUNDLED and not Path(self.model).is_dir():
            _ = self.pipe  # its commit is known when it is loaded
        told = {
            "model": self.model,
            "weights": weights(self.model),
            "sources": sources(Path(__file__), Path(retained_mass.__file__)),
        }
        return told | {"versions": versions(), "device": device_name()}

    @cached_property
    def _dense(self) -> ClipSpec:
        return ClipSpec("dense", "dense", None, SparseAttnProcessor("dense", min_tokens=0))

    def _call(self, wanted: ClipSpec) -> dict:
        return self.call if wanted.steps is None else self.call | {"num_inference_steps": wanted.steps}

    def _key(self, wanted: ClipSpec, scene: tuple[str, int]) -> tuple[str, dict]:
        """Name of a take, and all that decides it."""
        (prompt, seed), settings, call = scene, wanted.processor.settings, self._call(wanted)
        decides = self._same | {"call": call, "prompt": prompt, "seed": seed, "method": type(settings.method).__name__}
        if not isinstance(settings.method, Dense):
            schedule = asdict(settings.schedule)
            decides |= {"settings": settings.method.settings(), "schedule": schedule}
            decides |= {"executor": settings.executor, "block": settings.block, "min_tokens": settings.min_tokens}
        return wanted.name, decides

    def _warm_up(self, wanted: ClipSpec) -> None:
        """One sparse step of a clip nobody keeps, so that what is compiled or loaded at the first call of a shape is
        in no row's seconds."""
        settings = wanted.processor.settings
        at_once = replace(settings.schedule, dense_steps=0)
        given = {"executor": settings.executor, "block": settings.block, "min_tokens": settings.min_tokens}
        self.pipe.set_attn_processor(SparseAttnProcessor(settings.method, schedule=at_once, **given))
        try:
            generate(self.pipe, *self.scenes[0], self.call | {"num_inference_steps": 1})
        finally:
            self.pipe.set_attn_processor(None)

    def _take(self, wanted: ClipSpec, scene: tuple[str, int], progress: Progress) -> ClipRecord:
        (prompt, seed), dense = scene, None
        if wanted.steps is None and wanted.method != "dense":
            dense = self.shelf.get(*self._key(self._dense, scene))
        watch = _Watch(None if dense is None else dense.latents)
        self.pipe.set_attn_processor(wanted.processor)
        try:
            run = self.pipe.sparse_run
            run.observe(watch.retained)
            clip = generate(self.pipe, prompt, seed, self._call(wanted), progress, watch.latents)
            report = run.report()
        finally:
            self.pipe.set_attn_processor(None)
        seconds = clip.seconds - watch.looking.seconds
        note = report.as_dict() | {"seconds": seconds, "steps": watch.steps, "latent_error": watch.errors}
        note |= {"row": wanted.name, "prompt": prompt, "seed": seed}
        note["mass"] = [watch.mass[layer] for layer in sorted(watch.mass)]
        keep = wanted.method == "dense" and wanted.steps is None
        return ClipRecord(clip.frames, note, np.stack(watch.kept) if keep else None)


def check_steps(schedule: Schedule, steps: int) -> None:
    """Raises ValueError where no step would be sparse."""
    if schedule.first_sparse_step(steps) >= steps:
        raise ValueError(
            f"dense_steps={schedule.dense_steps} keeps all {steps} steps dense: there is nothing to compare"
        )


class _Watch:
    """What is seen while a clip is made: of some calls the attention that their plans retain, head by head, and after
    some steps the latents, rounded to float16 as they are kept, or against those of a dense clip, rounded alike. How
    long the looking took before the last step ended is told, for it is no part of making a clip."""

    def __init__(self, reference: np.ndarray | None) -> None:
        self.looking = Stopwatch()
        self.reference, self.kept, self.errors, self.steps = reference, [], [], 0
        self.calls, self.seen = {}, {}

    def retained(self, site: Site, q: Tensor, k: Tensor, plan: Any) -> None:
        number = self.calls[site.layer] = self.calls.get(site.layer, -1) + 1
        if number % EVERY == 0:
            with self.looking.timing(q.device):
                self.seen.setdefault(site.layer, []).append(
                    retained_mass.retained_mass(q, k, plan, rows=64).mean(0).cpu()
                )

    @property
    def mass(self) -> dict[int, list[float]]:
        return {layer: torch.stack(seen).mean(0).tolist() for layer, seen in self.seen.items()}

    def latents(self, step: int, steps: int, latents: Tensor) -> None:
        self.steps = steps
        measured_steps = sorted({round(x) for x in np.linspace(0, steps - 1, min(LATENTS, steps))})
        if step not in measured_steps:
            return
        # a clip's seconds end with its last step, before that step's latents are looked at
        with self.looking.timing(latents.device) if step < steps - 1 else nullcontext():
            rounded = latents.detach().half().cpu().numpy()
            if self.reference is None:
                self.kept.append(rounded)
            else:
                self.errors.append([step, relative_error(rounded, self.reference[measured_steps.index(step)])])
