"""Generate a clip for each prompt of a list, on one device or many, and resume after an interruption.

Every clip is a video and a JSON file of the same name with its settings and measurements. The JSON file is written
last, so a clip without it is not done. Under ``accelerate launch`` the processes share the remaining clips. A lock for
each clip prevents other processes from generating the clip or removing its partial files at the same time. The clips of
a process that was killed are generated at the next start.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from dit_sparse import SparseAttnProcessor, prepare

from ..bundled import BUNDLED
from ..notation.reading import check_regular_file, read_json
from ..output.files import json_values, partial_files, save_json, writable_folder
from ..output.media import check_video, save_video
from .checks import check_clip
from .clip_result import clip_result
from .generate import Progress, Stage, default_call, default_fps, generate, load_pipeline
from .model_config import check_model
from .processes import Interrupted, file_lock, interruptible, shard
from .prompts import Row

KINDS = ("mp4", "json")  # files of a clip

CALL_ARGUMENTS = {  # of rows, and of the pipeline call
    "steps": "num_inference_steps",
    "frames": "num_frames",
    "height": "height",
    "width": "width",
    "guidance": "guidance_scale",
    "negative_prompt": "negative_prompt",
}


@dataclass(frozen=True)
class Job:
    """One clip to generate.

    Attributes:
        name: of its files, without the suffix.
        prompt, seed, call: prompt, seed of the noise, and further arguments of the pipeline call.
        processor: the sparse attention.
        model: the bundled model, a local diffusers folder, or a name on the hub.
        fps: frames per second of the video file.
    """

    name: str
    prompt: str
    seed: int
    call: dict
    processor: SparseAttnProcessor
    model: str
    fps: int

    @property
    def settings(self) -> dict:
        """All settings that determine the clip, as plain values. Result files store them under ``"asked"``."""
        run = self.processor.settings
        values = {"model": self.model, "prompt": self.prompt, "seed": self.seed, "call": self.call, "fps": self.fps}
        values |= {"method": type(run.method).__name__, "settings": run.method.settings()}
        values |= {"schedule": asdict(run.schedule), "executor": run.executor, "block": run.block}
        values |= {"preset": run.preset}
        return json.loads(json.dumps(json_values(values)))


@dataclass(frozen=True)
class Batch:
    """A list of clips to generate. All arguments are checked before any long work.

    Attributes:
        rows: names and rows, as `read_rows` returns them.
        out: folder for the videos, their JSON files and ``manifest.json``.
        model: the bundled model, a local diffusers folder, or a name on the hub.
        settings: arguments of `SparseAttnProcessor` for rows without their own; None means its default.
        call: arguments of the pipeline call for rows without their own.
        seed: seed of the first clip of a row without its own.
        seeds: clips of each row, with consecutive seeds.
        retries: further attempts for a clip that fails, except for lack of memory.
        fps: frames per second of the video files; None: the default of the model.

    Raises:
        ValueError: an argument or row is invalid, or the folder holds clips with other settings or is not writable.
    """

    rows: Sequence[tuple[str, Row]]
    out: Path
    model: str = BUNDLED
    settings: dict = field(default_factory=dict)
    call: dict = field(default_factory=dict)
    seed: int = 0
    seeds: int = 1
    retries: int = 1
    fps: int | None = None

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.retries < 0:
            raise ValueError(f"seeds must be at least 1 and retries at least 0, got {self.seeds} and {self.retries}")
        check_model(self.model)
        names = {"manifest"}  # compared in lower case, because some file systems ignore case
        for job in self.jobs():
            if job.name.lower() in names:
                raise ValueError(f"two clips, or a clip and the manifest, would both be named {job.name}")
            names.add(job.name.lower())
            try:
                check_clip(job.prompt, job.seed, job.call, job.fps, model=self.model)
            except ValueError as error:
                raise ValueError(f"{job.name}: {error}") from None
            stored = self._stored_result(job) or {}
            if stored.get("status") == "done" and not _same_settings(stored.get("asked"), job.settings):
                raise ValueError(f"{self.out} holds {job.name} with other settings: choose another --out")
        files = (f"{name}.{kind}" for name in (*(job.name for job in self.jobs()), "manifest") for kind in KINDS)
        writable_folder(self.out, files)

    def jobs(self) -> list[Job]:
        """Return all clips, in the order of the rows."""
        call = default_call(self.model) | self.call
        fps = default_fps(self.model) if self.fps is None else self.fps
        jobs = []
        for name, row in self.rows:
            row_call = {argument: getattr(row, key) for key, argument in CALL_ARGUMENTS.items()}
            row_call = call | {argument: value for argument, value in row_call.items() if value is not None}
            processor, first_seed = self._processor(name, row), self.seed if row.seed is None else row.seed
            for seed in range(first_seed, first_seed + self.seeds):
                clip_name = name if self.seeds == 1 else f"{name}-seed{seed}"
                jobs.append(Job(clip_name, row.prompt, seed, row_call, processor, self.model, fps))
        return jobs

    def _processor(self, name: str, row: Row) -> SparseAttnProcessor:
        row_settings = {key: getattr(row, key) for key in ("method", "density", "dense_steps")}
        row_settings = {key: value for key, value in row_settings.items() if value is not None}
        try:
            return SparseAttnProcessor(**self.settings | row_settings)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from None

    def run(self, stage: Stage) -> dict:
        """Generate this process's share of the remaining clips, and return the manifest.

        Raises:
            Interrupted: SIGINT or SIGTERM was received. Finished clips stay valid.
        """
        jobs, progress = self.jobs(), stage("clips")
        names = set(shard(lambda: [job.name for job in jobs if not self._is_done(job)]))
        own_jobs = [job for job in jobs if job.name in names]
        with interruptible(lambda: stage("stopping")) as signals:
            pipe = prepare(load_pipeline(self.model)) if own_jobs else None
            try:
                for number, job in enumerate(own_jobs):
                    if signals:
                        raise Interrupted
                    with self._locked(job.name) as acquired:  # if not acquired, another process is generating this clip
                        if acquired and not self._is_done(job):
                            on_step = _batch_progress(progress, number, len(own_jobs), signals)
                            self._generate_or_fail(pipe, job, on_step)
                progress(len(jobs), len(jobs))
            finally:
                manifest = self._write_manifest(jobs)
        return manifest

    def _generate_or_fail(self, pipe: Any, job: Job, progress: Progress) -> None:
        """Generate a clip, or record why it failed: one failure must not end the batch."""
        for _ in range(1 + self.retries):
            try:
                return self._generate(pipe, job, progress)
            except Interrupted:
                raise
            except Exception as error:
                out_of_memory, message = _is_out_of_memory(error), f"{type(error).__name__}: {_first_line(error)}"
            torch.cuda.empty_cache()  # after the except block, because the error holds tensors
            if out_of_memory:
                message = f"out of memory: use fewer frames, a smaller size or a lower density ({message})"
                break
        save_json(self._path(job, "json"), {"status": "failed", "error": message, "asked": job.settings})

    def _generate(self, pipe: Any, job: Job, progress: Progress) -> None:
        pipe.set_attn_processor(job.processor)
        try:
            clip = generate(pipe, job.prompt, job.seed, job.call, progress)
            report = pipe.sparse_run.report().as_dict()
        finally:
            pipe.set_attn_processor(None)
        video = self._path(job, "mp4")
        save_video(video, clip.frames, job.fps)
        save_json(self._path(job, "json"), clip_result(job.settings, clip, report, video))

    def _write_manifest(self, jobs: Sequence[Job]) -> dict:
        """Write the status of all clips to ``manifest.json`` and return it."""
        with self._locked("manifest", wait=True):
            manifest, counts = self._status(jobs), None
            while manifest["count"] != counts:  # another process may have finished a clip meanwhile
                save_json(self.out / "manifest.json", manifest)
                counts, manifest = manifest["count"], self._status(jobs)
        if counts["done"] == len(jobs):  # an encoder can outlive the process that was killed
            for job in jobs:
                with self._locked(job.name):
                    pass
        return manifest

    def _status(self, jobs: Sequence[Job]) -> dict:
        clips = []
        for job in jobs:
            result = self._stored_result(job) or {"status": "missing", "asked": job.settings}
            clips.append({"name": job.name} | result)
        counts = {status: sum(clip["status"] == status for clip in clips) for status in ("done", "failed", "missing")}
        return {"count": counts, "clips": clips}

    @contextmanager
    def _locked(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Hold the lock of a clip or of the manifest, and remove its partial files, left by killed processes. Yields
        whether the lock was acquired."""
        with file_lock(self.out / f".{name}.lock", wait) as acquired:
            for path in partial_files(self.out, name) if acquired else ():
                path.unlink(missing_ok=True)
            yield acquired

    def _is_done(self, job: Job) -> bool:
        return (self._stored_result(job) or {}).get("status") == "done"

    def _stored_result(self, job: Job) -> dict | None:
        """Return the content of a clip's JSON file, or None if the file or the video of a finished clip is missing or
        damaged."""
        try:
            result = read_json(self._path(job, "json"))
        except ValueError:
            return None
        if not isinstance(result, dict) or "status" not in result:
            return None
        damaged = result["status"] == "done" and not _is_intact(self._path(job, "mp4"), result.get("video_sha256"))
        return None if damaged else result

    def _path(self, job: Job, kind: str) -> Path:
        return self.out / f"{job.name}.{kind}"


def _same_settings(stored: Any, settings: Any) -> bool:
    """Whether two settings agree. The names of settings may differ between versions, and a newer version may have
    further settings at the end that are None by default; order and values may not differ."""

    def values(part: Any) -> Any:
        if isinstance(part, dict):  # capitals are class names, such as {"Top": {"density": 0.2}}
            pairs = [(key if key[:1].isupper() else "", values(value)) for key, value in part.items()]
            while pairs and pairs[-1][1] is None:
                pairs.pop()
            return pairs
        return [values(value) for value in part] if isinstance(part, list) else part

    return values(stored) == values(settings)


def _batch_progress(progress: Progress, number: int, count: int, signals: list[int]) -> Progress:
    """Return the progress of clip ``number`` of ``count``, which raises `Interrupted` after a signal."""

    def on_step(step: int, steps: int) -> None:
        progress(number * steps + step, count * steps)
        if signals:
            raise Interrupted

    return on_step


def _is_intact(video: Path, digest: str | None) -> bool:
    """Whether a video file is unchanged since it was written; without a digest, as in folders of older versions,
    whether it is complete."""
    try:
        status = check_regular_file(video)
        return _is_intact_version(video, digest, status.st_size, status.st_mtime_ns)
    except (OSError, ValueError):
        return False


@lru_cache(maxsize=100_000)
def _is_intact_version(video: Path, digest: str | None, *_: int) -> bool:
    if digest:
        return sha256(video.read_bytes()).hexdigest() == digest
    check_video(video)
    return True


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
