"""Generation of the clips of a comparison. Clips that are stored already are not generated again."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dit_sparse import Method, Schedule, SparseAttnProcessor, prepare
from dit_sparse.bundled import BUNDLED
from dit_sparse.composition import nested_methods
from dit_sparse.eval.analysis import retained_mass
from dit_sparse.eval.bench.timing import first_line
from dit_sparse.generation.generate import Progress, generate, load_pipeline
from dit_sparse.methods.patterns.dense import Dense
from dit_sparse.output.environment import (
    commit,
    conditions,
    device_name,
    machine_load,
    method_digest,
    source_digest,
    versions,
    weights_digest,
)
from dit_sparse.profiling import probe
from dit_sparse.profiling.candidates import Candidate

from . import recorder
from .clip_spec import DENSE_SPEC, ClipSpec, Sample
from .clip_store import ClipRecord, ClipStore
from .recorder import ClipRecorder

Task = Callable[["ClipRunner", Progress], Any]  # for a runner, in this process or in a worker
PROBED_TOGETHER = 8  # methods whose attention errors are measured on one generation; their plans are in memory together
_log = logging.getLogger("dit_sparse")


class ClipRunner:
    """Generates and stores the clips of every row, for all prompts and seeds.

    The bundled model and local folders are loaded when the first clip is missing. A model on the hub is loaded at once,
    because the key of a clip holds the commit of its weights.

    Args:
        model: the bundled model, a local diffusers folder, or a name on the hub.
        prompts, seeds: every row has a clip for each pair.
        call: arguments of the pipeline's call.
        folder: where clips are stored.
        schedule, executor, block: settings of all rows.
    """

    progress_unit = "steps"

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
        self.model, self.call, self.store = model, call, ClipStore(folder)
        self.schedule, self.executor, self.block = schedule, executor, block
        self.samples = [Sample(prompt, seed) for prompt in prompts for seed in seeds]
        self.seeds = len(seeds)
        self._warmed_up: set[str] = set()

    @cached_property
    def pipe(self) -> Any:
        pipe = load_pipeline(self.model)
        check_steps(self.schedule, self.call.get("num_inference_steps", _default_steps(pipe)))
        return prepare(pipe)

    def generate_missing(
        self, specs: Sequence[ClipSpec], progress: Progress, samples: Sequence[Sample] | None = None
    ) -> dict[str, str]:
        """Generate the clips that are not stored.

        All rows of a sample are generated before the next sample, so that a slow period of the machine slows all rows
        alike. A row that fails is left out from then on.

        Args:
            specs: the rows.
            progress: counts denoising steps of the missing clips.
            samples: default: all.

        Returns:
            The error of every row that failed, by its name. All other rows have all their clips.

        Raises:
            Exception: dense attention, which all rows are compared with, failed.
        """
        jobs = [(sample, spec) for sample in samples or self.samples for spec in specs]
        jobs = [(sample, spec) for sample, spec in jobs if self.store.get(*self.key(spec, sample)) is None]
        total, done = sum(self._steps(spec) for _, spec in jobs), 0
        progress(*((0, total) if jobs else (1, 1)))
        errors: dict[str, str] = {}
        for sample, spec in jobs:
            if spec.name not in errors:
                try:
                    if spec.name not in self._warmed_up:
                        self._warm_up(spec)
                        self._warmed_up.add(spec.name)
                    clip = self._generate(spec, sample, lambda step, _, done=done: progress(done + step, total))
                except Exception as error:
                    if spec.is_reference:
                        raise
                    errors[spec.name] = first_line(error)
                    _log.warning("%s failed and is left out: %s", spec.name, errors[spec.name])
                else:
                    self.store.put(*self.key(spec, sample), clip)
            done += self._steps(spec)
            progress(done, total)
        return errors

    def run_tasks(self, tasks: Sequence[Task], progress: Progress) -> list:
        """Run tasks one after the other and return their results."""
        results = []
        for number, task in enumerate(tasks):
            report = lambda done, total, number=number: progress(number * total + done, len(tasks) * total)
            results.append(task(self, report))
        return results

    def conditions(self) -> dict:
        """Return device, versions and commit of the clips."""
        return conditions()

    def close(self) -> None:
        """Release what the runner holds besides memory; a runner of this process holds nothing."""

    def _steps(self, spec: ClipSpec) -> int:
        return self._call(spec).get("num_inference_steps") or _default_steps(self.pipe)

    def clip_pairs(self, spec: ClipSpec) -> Iterator[tuple[ClipRecord, ClipRecord]]:
        """Yield every stored clip of a row with the dense clip of its prompt and seed."""
        for sample in self.samples:
            clip, dense = (self.store.get(*self.key(one, sample)) for one in (spec, DENSE_SPEC))
            yield clip, dense

    def attention_errors(self, specs: Sequence[ClipSpec], progress: Progress) -> dict[str, float]:
        """Return the relative error of each method's attention output, measured on calls of one dense clip.

        Methods that depend on earlier calls, and methods that fail, are left out. Errors are stored like clips.
        """
        methods = {spec.method: spec.processor.settings.method for spec in specs}
        methods = {name: method for name, method in methods.items() if _is_measurable_on_single_calls(method)}
        missing = [name for name, method in methods.items() if self.store.get(*self._error_key(method)) is None]
        batches = [missing[first : first + PROBED_TOGETHER] for first in range(0, len(missing), PROBED_TOGETHER)]
        while batches:
            names = batches.pop(0)
            try:
                errors = self._measure_errors({name: methods[name] for name in names}, progress)
            except Exception as error:
                if len(names) == 1:
                    _log.warning("the attention error of %s cannot be measured: %s", names[0], first_line(error))
                else:
                    batches = [[name] for name in names] + batches
                continue
            for name, value in errors.items():
                self.store.put(*self._error_key(methods[name]), ClipRecord(np.empty(0), {"error": value}))
        stored = {name: self.store.get(*self._error_key(method)) for name, method in methods.items()}
        return {name: record.metadata["error"] for name, record in stored.items() if record}

    def _measure_errors(self, methods: dict[str, Method], progress: Progress) -> dict[str, float]:
        candidates = [Candidate(name, method) for name, method in methods.items()]
        make_clip = lambda: generate(self.pipe, *self.samples[0], self.call, progress)
        measurements = probe.measure_candidates(self.pipe, make_clip, candidates, self.schedule, self.block)
        return dict(zip(methods, measurements.error.mean((1, 2)).sqrt().tolist(), strict=True))

    def _error_key(self, method: Method) -> tuple[str, dict]:
        sample = self.samples[0]
        key = self.shared_key | {"call": self.call, "prompt": sample.prompt, "seed": sample.seed}
        key |= {"method": type(method).__name__, "method_sources": method_digest(method), "settings": method.settings()}
        return "error", key | {"schedule": asdict(self.schedule), "executor": self.executor, "block": self.block}

    @cached_property
    def _commit(self) -> str | None:
        return commit()

    @cached_property
    def shared_key(self) -> dict:
        """The part of the key that all clips share."""
        if self.model != BUNDLED and not Path(self.model).is_dir():
            _ = self.pipe  # the commit of a model on the hub is known once it is loaded
        return {
            "model": self.model,
            "weights": weights_digest(self.model),
            "sources": source_digest(
                *(Path(module) for module in (__file__, recorder.__file__, retained_mass.__file__))
            ),
            "versions": versions(),
            "device": device_name(),
        }

    def key(self, spec: ClipSpec, sample: Sample) -> tuple[str, dict]:
        """Return the name of a clip and everything that affects it."""
        settings = spec.processor.settings
        key = self.shared_key | {"call": self._call(spec), "prompt": sample.prompt, "seed": sample.seed}
        key |= {"method": type(settings.method).__name__, "method_sources": method_digest(settings.method)}
        if not isinstance(settings.method, Dense):
            key |= {"settings": settings.method.settings(), "schedule": asdict(settings.schedule)}
            key |= {"executor": settings.executor, "block": settings.block, "min_tokens": settings.min_tokens}
        return spec.name, key

    def _call(self, spec: ClipSpec) -> dict:
        return self.call if spec.steps is None else self.call | {"num_inference_steps": spec.steps}

    def _warm_up(self, spec: ClipSpec) -> None:
        """Run one sparse step, so that one-time compilation and loading are not part of a row's time."""
        settings = spec.processor.settings
        processor = SparseAttnProcessor(
            settings.method,
            schedule=replace(settings.schedule, dense_steps=0),
            executor=settings.executor,
            block=settings.block,
            min_tokens=settings.min_tokens,
        )
        self.pipe.set_attn_processor(processor)
        try:
            generate(self.pipe, *self.samples[0], self.call | {"num_inference_steps": 1})
        finally:
            self.pipe.set_attn_processor(None)

    def _generate(self, spec: ClipSpec, sample: Sample, progress: Progress) -> ClipRecord:
        dense = None
        if spec.steps is None and not spec.is_reference:
            dense = self.store.get(*self.key(DENSE_SPEC, sample))
        record = ClipRecorder(None if dense is None else dense.latents)
        self.pipe.set_attn_processor(spec.processor)
        try:
            run = self.pipe.sparse_run
            run.observe(record.observe_attention)
            clip = generate(self.pipe, *sample, self._call(spec), progress, record.observe_latents)
            report = run.report()
        finally:
            self.pipe.set_attn_processor(None)
        metadata = report.as_dict() | {
            "row": spec.name,
            "prompt": sample.prompt,
            "seed": sample.seed,
            "seconds": clip.seconds - record.stopwatch.seconds,
            "steps": record.steps,
            "latent_error": record.latent_errors,
            "mass": record.mean_mass(),
            "commit": self._commit,
            "load": machine_load(),
        }
        return ClipRecord(clip.frames, metadata, np.stack(record.latents) if spec.is_reference else None)


def check_steps(schedule: Schedule, steps: int) -> None:
    """Raise ValueError if a schedule keeps every step dense."""
    if schedule.first_sparse_step(steps) >= steps:
        raise ValueError(
            f"dense_steps={schedule.dense_steps} keeps all {steps} steps dense: lower it to compare sparse methods"
        )


def _default_steps(pipe: Any) -> int:
    return inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default


def _is_measurable_on_single_calls(method: Method) -> bool:
    return not any(part.reuses_outputs or isinstance(part, Dense) for part in nested_methods(method))
