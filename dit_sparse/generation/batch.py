"""Generate a clip for each prompt of a list, on one device or many, and resume after an interruption.

Every clip is a video and a JSON file of the same name with its settings and measurements, see
`dit_sparse.generation.clip_folder`. Under ``accelerate launch`` the processes share the remaining clips, and the clips
of a process that was killed are generated at the next start. `dit_sparse.generation.ray_batch` runs a batch on a Ray
cluster instead.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dit_sparse import SparseAttnProcessor, prepare

from ..bundled import BUNDLED
from ..output.files import json_values, save_json, writable_folder
from ..output.media import save_video
from .checks import check_clip
from .clip_folder import ClipFolder, LiveManifest, begin_measurement, end_measurement, same_settings
from .clip_result import clip_result
from .generate import Progress, Stage, default_call, default_fps, generate, load_pipeline
from .loading import LoadOptions
from .model_config import check_model
from .processes import Interrupted, interruptible, shard
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
        load: how the pipeline is loaded.
    """

    name: str
    prompt: str
    seed: int
    call: dict
    processor: SparseAttnProcessor
    model: str
    fps: int
    load: LoadOptions = field(default_factory=LoadOptions)

    @property
    def settings(self) -> dict:
        """All settings that determine the clip, as plain values. Result files store them under ``"asked"``."""
        run = self.processor.settings
        values = {"model": self.model, "prompt": self.prompt, "seed": self.seed, "call": self.call, "fps": self.fps}
        values |= {"method": type(run.method).__name__, "settings": run.method.settings()}
        values |= {"schedule": asdict(run.schedule), "executor": run.executor, "block": run.block}
        values |= {"preset": run.preset, "dtype": self.load.dtype, "vae_tiling": self.load.vae_tiling or None}
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
        load: how the pipeline is loaded.

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
    load: LoadOptions = field(default_factory=LoadOptions)

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
            stored = self.folder.result(job.name) or {}
            if stored.get("status") == "done" and not same_settings(stored.get("asked"), job.settings):
                raise ValueError(f"{self.out} holds {job.name} with other settings: choose another --out")
        files = (f"{name}.{kind}" for name in (*(job.name for job in self.jobs()), "manifest") for kind in KINDS)
        writable_folder(self.out, files)

    @property
    def folder(self) -> ClipFolder:
        return ClipFolder(self.out)

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
                jobs.append(Job(clip_name, row.prompt, seed, row_call, processor, self.model, fps, self.load))
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
        jobs, progress, folder = self.jobs(), stage("clips"), self.folder
        names = set(shard(lambda: [job.name for job in jobs if not folder.is_done(job.name)]))
        own_jobs = [job for job in jobs if job.name in names]
        live = LiveManifest(folder, jobs) if int(os.environ.get("RANK", 0)) == 0 else None
        with interruptible(lambda: stage("stopping")) as signals:
            pipe = prepare(load_pipeline(self.model, options=self.load)) if own_jobs else None
            try:
                for number, job in enumerate(own_jobs):
                    if signals:
                        raise Interrupted
                    on_step = _batch_progress(progress, number, len(own_jobs), signals)
                    self.generate_missing(pipe, job, on_step, live.update if live else None)
                progress(len(jobs), len(jobs))
            finally:
                manifest = folder.write_manifest(jobs)
        return manifest

    def generate_missing(
        self,
        pipe: Any,
        job: Job,
        progress: Progress | None = None,
        on_start: Callable[[], None] | None = None,
        wait: bool = False,
    ) -> None:
        """Generate a clip unless it is done, or record why it failed: one failure must not end the batch.

        Args:
            pipe: a prepared pipeline of the batch's model.
            job: the clip.
            progress: called after each denoising step.
            on_start: called when the clip is known as running.
            wait: whether to wait for another process that is generating the clip; otherwise it is left to that process.
        """
        with self.folder.locked(job.name, wait) as acquired:
            if acquired and not self.folder.is_done(job.name):
                self._generate_or_fail(pipe, job, progress, on_start)

    def _generate_or_fail(
        self, pipe: Any, job: Job, progress: Progress | None, on_start: Callable[[], None] | None
    ) -> None:
        for _ in range(1 + self.retries):
            measured = begin_measurement()
            self.folder.announce(job.name, measured)
            if on_start:
                on_start()
            try:
                return self._generate(pipe, job, progress, measured)
            except Interrupted:
                raise
            except Exception as error:
                out_of_memory, message = _is_out_of_memory(error), f"{type(error).__name__}: {_first_line(error)}"
                lines = traceback.format_exc()
            torch.cuda.empty_cache()  # after the except block, because the error holds tensors
            if out_of_memory:
                message = f"out of memory: use fewer frames, a smaller size or a lower density ({message})"
                break
        self.fail(job, message, end_measurement(measured) | {"traceback": lines})

    def fail(self, job: Job, message: str, measured: dict) -> None:
        """Record why a clip failed."""
        failure = {"status": "failed", "error": message, "asked": job.settings}
        save_json(self.folder.file(job.name, "json"), failure | measured)

    def _generate(self, pipe: Any, job: Job, progress: Progress | None, measured: dict) -> None:
        pipe.set_attn_processor(job.processor)
        try:
            clip = generate(pipe, job.prompt, job.seed, job.call, progress)
            report = pipe.sparse_run.report().as_dict()
        finally:
            pipe.set_attn_processor(None)
        video = self.folder.file(job.name, "mp4")
        save_video(video, clip.frames, job.fps)
        result = clip_result(job.settings, clip, report, video) | end_measurement(measured)
        save_json(self.folder.file(job.name, "json"), result)


def _batch_progress(progress: Progress, number: int, count: int, signals: list[int]) -> Progress:
    """Return the progress of clip ``number`` of ``count``, which raises `Interrupted` after a signal."""

    def on_step(step: int, steps: int) -> None:
        progress(number * steps + step, count * steps)
        if signals:
            raise Interrupted

    return on_step


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
