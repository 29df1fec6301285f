"""Many prompts, one after the other, on one device or many: what is done is not done again.

Every clip is a video and a JSON file of the same name with all that decided and was measured; the JSON comes last, so
a clip without it is not done. Under ``accelerate launch`` the first process tells all others what is left, and each
takes every n-th of it: no clip twice, and what a process that dies leaves is done by the next start. After that they
do not speak with each other, so that none can wait for a dead one.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from dit_sparse import SparseAttnProcessor, prepare

from ..bundled import BUNDLED
from ..output.environment import conditions
from ..output.files import for_json, save_json, writable_folder
from ..output.media import save_video
from .generate import Progress, generate, load, usual_call, usual_fps
from .prompts import LARGEST, Row

ARGUMENTS = {"steps": "num_inference_steps", "frames": "num_frames", "height": "height", "width": "width"}
ARGUMENTS |= {"guidance": "guidance_scale", "negative_prompt": "negative_prompt"}
Stage = Callable[[str], Progress]
_shares = itertools.count()


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
    fps: int

    @property
    def asked(self) -> dict:
        """All that decides the clip, as plain values."""
        settings = self.processor.settings
        told = {"model": self.model, "prompt": self.prompt, "seed": self.seed, "call": self.call, "fps": self.fps}
        told |= {"method": type(settings.method).__name__, "settings": settings.method.settings()}
        told |= {"schedule": asdict(settings.schedule), "executor": settings.executor, "block": settings.block}
        return json.loads(json.dumps(for_json(told)))


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
        fps: frames a second of the files; None: those of the model.
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
        taken = {"manifest"}  # some file systems do not tell capitals apart
        for job in self.jobs():
            if job.name.lower() in taken:
                raise ValueError(f"two clips, or a clip and the manifest, would both be named {job.name}")
            taken.add(job.name.lower())
            if not 0 <= job.seed < 2**63:
                raise ValueError(f"{job.name}: a seed is at least 0 and below 2**63, not {job.seed}")
            for what, number in (job.call | {"fps": job.fps}).items():
                if isinstance(number, int | float) and not abs(number) <= LARGEST:
                    raise ValueError(f"{job.name}: {what} is a number up to {LARGEST}, not {number}")
            found = self._result(job) or {}
            if found.get("status") == "done" and found.get("asked") != job.asked:
                raise ValueError(f"{self.out} holds {job.name} made with other settings: choose another --out")
        writable_folder(self.out)

    def jobs(self) -> list[Job]:
        """Every clip, in the order of the rows."""
        usual, fps = usual_call(self.model), self.fps or usual_fps(self.model)
        made = []
        for name, row in self.rows:
            own = {to: getattr(row, key) for key, to in ARGUMENTS.items()}
            call = usual | self.call | {to: given for to, given in own.items() if given is not None}
            processor, first = self._processor(name, row), self.seed if row.seed is None else row.seed
            for number in range(self.seeds):
                each = name if self.seeds == 1 else f"{name}-seed{first + number}"
                made.append(Job(each, row.prompt, first + number, call, processor, self.model, fps))
        return made

    def _processor(self, name: str, row: Row) -> SparseAttnProcessor:
        special = {key: getattr(row, key) for key in ("method", "density", "dense_steps")}
        try:
            return SparseAttnProcessor(**self.default_budget | {key: x for key, x in special.items() if x is not None})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from None

    def run(self, stage: Stage) -> dict:
        """Make this process's share of what is left. Returns the manifest.

        Raises:
            Stopped: after SIGINT or SIGTERM, at the end of a step. What was done stays done.
        """
        jobs, progress = self.jobs(), stage("clips")
        share = set(_shard(lambda: self._left(jobs)))
        mine = [job for job in jobs if job.name in share]
        with _stop_flag(lambda: stage("stopping")) as stopping:
            pipe = prepare(load(self.model)) if mine else None
            try:
                for number, job in enumerate(mine):
                    if stopping:
                        raise Stopped
                    self._make(pipe, job, _told(progress, number, len(mine), stopping))
                progress(len(jobs), len(jobs))
            finally:
                manifest = self._manifest(jobs)
        return manifest

    def _left(self, jobs: Sequence[Job]) -> list[str]:
        """The names of what is not done. Only the first process asks, before any begins: nobody's draft is in use."""
        self._remove_partial_files({job.name for job in jobs} | {"manifest"})
        return [job.name for job in jobs if not self._done(job)]

    def _make(self, pipe: Any, job: Job, progress: Progress) -> None:
        for _ in range(1 + self.retries):
            try:
                return self._clip(pipe, job, progress)
            except Stopped:
                raise
            except Exception as wrong:  # one clip must not end a night's work; the manifest tells
                too_much, error = _out_of_memory(wrong), f"{type(wrong).__name__}: {_first_line(wrong)}"
            torch.cuda.empty_cache()  # not before the error has gone, which holds tensors
            if too_much:
                error = f"out of memory: fewer frames, a smaller size or a lower density may fit ({error})"
                break
        save_json(self._path(job, "json"), {"status": "failed", "error": error, "asked": job.asked})

    def _clip(self, pipe: Any, job: Job, progress: Progress) -> None:
        pipe.set_attn_processor(job.processor)
        try:
            clip = generate(pipe, job.prompt, job.seed, job.call, progress)
            report = pipe.sparse_run.report().as_dict()
        finally:
            pipe.set_attn_processor(None)
        video = self._path(job, "mp4")
        save_video(video, clip.frames, job.fps)
        if not _whole(video):  # the encoder says nothing when the disk is full or somebody kills it
            video.unlink()
            raise OSError(f"{video} could not be written whole; is the disk full?")
        done = {"status": "done", "seconds": clip.seconds, "report": report, "asked": job.asked}
        save_json(self._path(job, "json"), done | conditions())

    def _manifest(self, jobs: Sequence[Job]) -> dict:
        """All clips and how they stand, written to ``manifest.json``."""
        manifest, before = self._status(jobs), None
        while manifest["count"] != before:  # another process may have ended a clip, and its manifest be the older one
            save_json(self.out / "manifest.json", manifest)
            before, manifest = manifest["count"], self._status(jobs)
        if before["done"] == len(jobs):  # an encoder can outlive the process that was killed
            self._remove_partial_files({job.name for job in jobs})
        return manifest

    def _status(self, jobs: Sequence[Job]) -> dict:
        clips = []
        for job in jobs:
            found = self._result(job) or {"status": "missing", "asked": job.asked}
            clips.append({"name": job.name} | found)
        number = {status: sum(clip["status"] == status for clip in clips) for status in ("done", "failed", "missing")}
        return {"count": number, "clips": clips}

    def _remove_partial_files(self, names: set[str]) -> None:
        """Remove the drafts that killed processes left."""
        for path in self.out.glob(".*"):
            draft = re.fullmatch(r"\.(.+)\.[^.]+\.(mp4|json)", path.name)
            if draft and draft[1] in names:
                path.unlink(missing_ok=True)

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


def _shard(left: Callable[[], list[str]]) -> list[str]:
    """This process's part of what is left, as the first process sees it: what others see may have changed since."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return left()
    from torch.distributed import DistStoreError

    store, rank, world = _rendezvous()
    key = f"dit-sparse-batch-{next(_shares)}"
    if rank == 0:
        store.set(key, json.dumps(left()))
    names = json.loads(store.get(key))
    store.set(f"{key}-{rank}", "heard")
    if rank == 0:  # the store may be in this process, and end with it; but do not wait long for one that died
        with suppress(DistStoreError):
            store.wait([f"{key}-{other}" for other in range(world)], timedelta(minutes=1))
    return names[rank::world]


@functools.cache
def _rendezvous() -> tuple[Any, int, int]:
    """A store that all processes of a launch reach, which of them this is, and how many they are."""
    from torch.distributed import rendezvous

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return next(rendezvous("env://"))


@contextmanager
def _stop_flag(heard: Callable[[], Any]) -> Iterator[list]:
    """A list that is no longer empty once SIGINT or SIGTERM came; a second one ends the process at once."""
    stopping: list[int] = []
    before = {}

    def stop(number: int, _: Any) -> None:
        stopping.append(number)
        signal.signal(number, before[number])
        heard()

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


def _whole(video: Path) -> bool:
    """Whether an MP4 file ends where its last part ends, and has the index, which is written last."""
    parts, at, end = set(), 0, video.stat().st_size
    with video.open("rb") as file:
        while at < end:
            file.seek(at)
            size, part = int.from_bytes(file.read(4), "big"), file.read(4)
            size = int.from_bytes(file.read(8), "big") if size == 1 else size
            if size < 8:
                return False
            parts.add(part)
            at += size
    return at == end and b"moov" in parts


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
