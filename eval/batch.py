"""Many prompts, one after the other, on one device or many: what is done is not done again.

Every clip is a video and a JSON file of the same name with all that decided and was measured; the JSON comes last, so
a clip without it is not done. Under ``accelerate launch`` the first process tells all others what is left, and each
takes every n-th of it: no clip twice, and what a process that dies leaves is done by the next start.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dit_sparse import SparseAttnProcessor, prepare

from .environment import conditions
from .files import save_json, save_video, writable_folder
from .generate import BUNDLED, BUNDLED_CALL, BUNDLED_FPS, Progress, generate, load
from .prompt_files import Row

USUAL_FPS = 16
ARGUMENTS = {"steps": "num_inference_steps", "frames": "num_frames", "height": "height", "width": "width"}
ARGUMENTS |= {"guidance": "guidance_scale", "negative_prompt": "negative_prompt"}
Stage = Callable[[str], Progress]


class Stopped(Exception):
    """Somebody asked to stop, and the current step has ended."""


@dataclass(frozen=True)
class Job:
    """One clip."""

    name: str
    prompt: str
    seed: int
    call: dict
    processor: SparseAttnProcessor
    model: str

    @property
    def asked(self) -> dict:
        """All that decides the clip, as plain values."""
        settings = self.processor.settings
        told = {"model": self.model, "prompt": self.prompt, "seed": self.seed, "call": self.call}
        told |= {"method": type(settings.method).__name__, "settings": settings.method.settings()}
        told |= {"schedule": asdict(settings.schedule), "executor": settings.executor, "block": settings.block}
        return json.loads(json.dumps(told))


@dataclass(frozen=True)
class Batch:
    """What is to be made; everything is checked before any long work.

    Attributes:
        rows: names and rows, as ``read_rows`` gives them.
        out: folder for the videos, their JSON files and ``manifest.json``.
        model: the bundled one, a local diffusers folder, or a name on the hub.
        usual: settings of `SparseAttnProcessor` for rows that do not say otherwise.
        call: arguments of the pipeline, likewise.
        seed, seeds: the first seed, and how many clips there are of a row, with one seed more each.
        retries: how often a clip that failed is tried again; not one that did not fit into memory.
        fps: frames a second of the files; None: 8 for the bundled model, else 16.
    """

    rows: Sequence[tuple[str, Row]]
    out: Path
    model: str = BUNDLED
    usual: dict = field(default_factory=dict)
    call: dict = field(default_factory=dict)
    seed: int = 0
    seeds: int = 1
    retries: int = 1
    fps: int | None = None

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.retries < 0:
            raise ValueError(f"seeds is at least 1 and retries at least 0, not {self.seeds} and {self.retries}")
        writable_folder(self.out)
        taken = {"manifest"}  # some file systems do not tell capitals apart
        for job in self.jobs():
            if job.name.lower() in taken:
                raise ValueError(f"two clips, or a clip and the manifest, would both be named {job.name}")
            taken.add(job.name.lower())
            if (found := self._result(job)) and found.get("asked") != job.asked:
                raise ValueError(f"{self.out} holds {job.name} made with other settings: choose another --out")

    def jobs(self) -> list[Job]:
        """Every clip, in the order of the rows."""
        usual = BUNDLED_CALL if self.model == BUNDLED else {}
        made = []
        for name, row in self.rows:
            own = {to: getattr(row, key) for key, to in ARGUMENTS.items()}
            call = usual | self.call | {to: given for to, given in own.items() if given is not None}
            processor, first = self._processor(name, row), self.seed if row.seed is None else row.seed
            for number in range(self.seeds):
                each = name if self.seeds == 1 else f"{name}-seed{first + number}"
                made.append(Job(each, row.prompt, first + number, call, processor, self.model))
        return made

    def _processor(self, name: str, row: Row) -> SparseAttnProcessor:
        special = {key: getattr(row, key) for key in ("method", "density", "dense_steps")}
        try:
            return SparseAttnProcessor(**self.usual | {key: x for key, x in special.items() if x is not None})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from None

    def run(self, stage: Stage) -> dict:
        """Make this process's share of what is left. Returns the manifest.

        Raises:
            Stopped: after SIGINT or SIGTERM, at the end of a step. What was done stays done.
        """
        jobs, progress = self.jobs(), stage("clips")
        with _place() as (rank, world, everyone_knows), _stop_flag() as stopping:
            left = everyone_knows([job.name for job in jobs if not self._done(job)])
            mine = [job for job in jobs if job.name in set(left[rank::world])]
            pipe = prepare(load(self.model)) if mine else None
            try:
                for number, job in enumerate(mine):
                    self._make(pipe, job, _told(progress, number, len(mine), stopping))
                progress(1, 1)
            finally:
                manifest = self._manifest(jobs)
        return manifest

    def _make(self, pipe: Any, job: Job, progress: Progress) -> None:
        for draft in self.out.glob(f".{job.name}.*"):  # of a process that was killed
            draft.unlink(missing_ok=True)
        error = ""
        for _ in range(1 + self.retries):
            try:
                return self._clip(pipe, job, progress)
            except torch.OutOfMemoryError as too_much:
                torch.cuda.empty_cache()
                error = (
                    f"out of memory: fewer frames, a smaller size or a lower density may fit ({_first_line(too_much)})"
                )
                break
            except Stopped:
                raise
            except Exception as wrong:  # one clip must not end a night's work; the manifest tells
                error = f"{type(wrong).__name__}: {_first_line(wrong)}"
        save_json(self._path(job, "json"), {"status": "failed", "error": error, "asked": job.asked})

    def _clip(self, pipe: Any, job: Job, progress: Progress) -> None:
        pipe.set_attn_processor(job.processor)
        try:
            clip = generate(pipe, job.prompt, job.seed, job.call, progress)
            report = pipe.sparse_run.report().as_dict()
        finally:
            pipe.set_attn_processor(None)
        fps = self.fps or (BUNDLED_FPS if self.model == BUNDLED else USUAL_FPS)
        save_video(self._path(job, "mp4"), clip.frames, fps)
        done = {"status": "done", "seconds": clip.seconds, "report": report, "asked": job.asked}
        save_json(self._path(job, "json"), done | conditions())

    def _manifest(self, jobs: Sequence[Job]) -> dict:
        """All clips and how they stand, written to ``manifest.json``: whoever ends last has seen them all."""
        clips = []
        for job in jobs:
            found = self._result(job) or {"status": "missing", "asked": job.asked}
            clips.append({"name": job.name} | found)
        count = {status: sum(clip["status"] == status for clip in clips) for status in ("done", "failed", "missing")}
        manifest = {"count": count, "clips": clips}
        save_json(self.out / "manifest.json", manifest)
        return manifest

    def _done(self, job: Job) -> bool:
        return (self._result(job) or {}).get("status") == "done" and self._path(job, "mp4").exists()

    def _result(self, job: Job) -> dict | None:
        try:
            found = json.loads(self._path(job, "json").read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and "status" in found else None

    def _path(self, job: Job, kind: str) -> Path:
        return self.out / f"{job.name}.{kind}"


@contextmanager
def _place() -> Iterator[tuple[int, int, Callable[[list], list]]]:
    """Which of how many processes this is, and a function that gives all of them what the first one has."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        yield 0, 1, list
        return
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState(cpu=not torch.cuda.is_available())
    try:
        yield state.process_index, state.num_processes, lambda names: broadcast_object_list([names])[0]
    finally:
        state.destroy_process_group()


@contextmanager
def _stop_flag() -> Iterator[list]:
    """A list that is no longer empty once SIGINT or SIGTERM came; a second one ends the process at once."""
    stopping: list[int] = []
    before = {}

    def stop(number: int, _: Any) -> None:
        stopping.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, stop)
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _told(progress: Progress, number: int, count: int, stopping: list) -> Progress:
    def told(step: int, steps: int) -> None:
        progress(number * steps + step, count * steps)
        if stopping:
            raise Stopped

    return told


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
