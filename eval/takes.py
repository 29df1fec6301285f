"""Making the clips of a comparison: what is on the shelf already is not made again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_sparse import Schedule, Site, SparseAttnProcessor, prepare, search
from dit_sparse.composition import inside
from dit_sparse.methods.dense import Dense
from dit_sparse.methods.rettention import Rettention
from dit_sparse.report import Stopwatch

from .clips import Shelf, Take
from .environment import device_name, sources, versions
from .generate import Progress, generate, load
from .metrics import relative_error
from .retained import retained_mass

LATENTS = 9  # steps after which the latents of a dense clip are kept, to see how others depart from them
EVERY = 8  # of the calls of a layer, one is looked at for what its plan retains


@dataclass(frozen=True)
class Wanted:
    """One row: a method at a density, or dense attention with fewer steps than the others have.

    Attributes:
        given: how it was asked for.
        method: its name.
        density: None for dense attention and for profiles.
        processor: how it is set up.
        steps: None: as many as the others.
    """

    given: str
    method: str
    density: float | None
    processor: SparseAttnProcessor
    steps: int | None = None

    @property
    def name(self) -> str:
        if self.steps is not None:
            return f"{self.method}, {self.steps} steps"
        return self.method if self.density is None else f"{self.method} {self.density:g}"


class Studio:
    """Takes of every row, for all prompts and seeds. The pipeline is loaded when the first take is missing."""

    def __init__(self, model: str, prompts: Sequence[str], seeds: Sequence[int], call: dict, folder: Path) -> None:
        self.model, self.call, self.shelf = model, call, Shelf(folder)
        self.scenes = [(prompt, seed) for prompt in prompts for seed in seeds]
        self.seeds = len(seeds)
        self._same = {"model": model, "sources": sources(), "versions": versions(), "device": device_name()}

    @cached_property
    def pipe(self) -> Any:
        return prepare(load(self.model))

    def make(self, wanted: Wanted, progress: Progress) -> None:
        """Make the takes of a row that are missing; ``progress`` counts steps of all."""
        for number in range(len(self.scenes)):
            if self.shelf.get(*self._place(wanted, number)) is None:
                told = lambda step, steps, n=number: progress(n * steps + step, len(self.scenes) * steps)
                self.shelf.put(*self._place(wanted, number), self._take(wanted, number, told))
            progress(number + 1, len(self.scenes))

    def takes(self, wanted: Wanted) -> Iterator[tuple[Take, Take]]:
        """Every take of a row that was made, and the dense one of its prompt and seed."""
        for number in range(len(self.scenes)):
            take, dense = (self.shelf.get(*self._place(row, number)) for row in (wanted, self._dense))
            yield take, dense

    def dense_note(self) -> dict:
        """What was noted of the first dense take."""
        return self.shelf.get(*self._place(self._dense, 0)).note

    def errors(self, rows: list[Wanted], schedule: Schedule, block: int | None, progress: Progress) -> dict[str, float]:
        """Relative error of the attention output of each method, by the calls of one dense clip: what no later step
        can blur. A method that lives on what it saw of dense steps is not judged so."""
        lives_on_steps = lambda one: any(isinstance(part, Dense | Rettention) for part in inside(one))
        judged = {row.method: row.processor.settings.method for row in rows}
        judged = {name: one for name, one in judged.items() if not lives_on_steps(one)}
        settings = {name: one.settings() for name, one in judged.items()}
        if not judged:
            return {}
        place = (
            "errors",
            self._same | {"call": self.call, "methods": settings, "schedule": asdict(schedule), "block": block},
        )
        if (found := self.shelf.get(*place)) is None:
            (prompt, seed), tried = self.scenes[0], [search.Candidate(*pair) for pair in judged.items()]
            clip = lambda: generate(self.pipe, prompt, seed, self.call, progress)
            error = search.measure(self.pipe, clip, tried, schedule, block).error.mean((1, 2)).sqrt()
            found = Take(np.empty(0), dict(zip(judged, error.tolist(), strict=True)))
            self.shelf.put(*place, found)
        return found.note

    @cached_property
    def _dense(self) -> Wanted:
        return Wanted("dense", "dense", None, SparseAttnProcessor("dense", min_tokens=0))

    def _place(self, wanted: Wanted, number: int) -> tuple[str, dict]:
        """Name of a take, and all that decides it."""
        prompt, seed = self.scenes[number]
        settings, call = wanted.processor.settings, self.call
        if wanted.steps is not None:
            call = call | {"num_inference_steps": wanted.steps}
        decides = self._same | {"call": call, "prompt": prompt, "seed": seed, "method": type(settings.method).__name__}
        if not isinstance(settings.method, Dense):
            schedule = asdict(settings.schedule)
            decides |= {"settings": settings.method.settings(), "schedule": schedule}
            decides |= {"executor": settings.executor, "block": settings.block}
        return f"{wanted.name}-{number}", decides

    def _take(self, wanted: Wanted, number: int, progress: Progress) -> Take:
        (prompt, seed), call = self.scenes[number], self.call
        if wanted.steps is not None:
            call = call | {"num_inference_steps": wanted.steps}
        dense = None
        if wanted.steps is None and wanted.method != "dense":
            dense = self.shelf.get(*self._place(self._dense, number))
        watch = _Watch(None if dense is None else dense.latents)
        self.pipe.set_attn_processor(wanted.processor)
        try:
            run = self.pipe.sparse_run
            run.observe(watch.retained)
            clip = generate(self.pipe, prompt, seed, call, progress, watch.latents)
            report = run.report()
        finally:
            self.pipe.set_attn_processor(None)
        seconds = clip.seconds - watch.looking.seconds
        note = report.as_dict() | {"seconds": seconds, "steps": watch.steps, "latent_error": watch.errors}
        note |= {"row": wanted.name, "prompt": prompt, "seed": seed}
        note["mass"] = [watch.mass[layer] for layer in sorted(watch.mass)]
        keep = wanted.method == "dense" and wanted.steps is None
        return Take(clip.frames, note, np.stack(watch.kept) if keep else None)


class _Watch:
    """What is seen while a clip is made: the attention that plans retain, head by head, and the latents. How long the
    looking took is kept, for it is no part of making a clip."""

    def __init__(self, reference: np.ndarray | None) -> None:
        self.looking = Stopwatch()
        self.reference, self.kept, self.errors, self.steps = reference, [], [], 0
        self.calls, self.seen = {}, {}

    def retained(self, site: Site, q: Tensor, k: Tensor, plan: Any) -> None:
        number = self.calls[site.layer] = self.calls.get(site.layer, -1) + 1
        if number % EVERY == 0:
            with self.looking.running(q.device):
                self.seen.setdefault(site.layer, []).append(retained_mass(q, k, plan, rows=64).mean(0).cpu())

    @property
    def mass(self) -> dict[int, list[float]]:
        return {layer: torch.stack(seen).mean(0).tolist() for layer, seen in self.seen.items()}

    def latents(self, step: int, steps: int, latents: Tensor) -> None:
        self.steps = steps
        looked_at = sorted({round(x) for x in np.linspace(0, steps - 1, min(LATENTS, steps))})
        if step not in looked_at:
            return
        self.kept.append(latents.detach().half().cpu().numpy())
        if self.reference is not None:
            reference = self.reference[looked_at.index(step)].astype(np.float32)
            self.errors.append([step, relative_error(latents.detach().float().cpu().numpy(), reference)])
