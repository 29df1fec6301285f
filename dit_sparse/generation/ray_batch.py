"""Run a batch on the workers of a Ray cluster: any number of GPUs and machines that share the output folder."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from dit_sparse import prepare

from ..output.environment import device_name
from .batch import Batch, Job
from .clip_folder import LiveManifest
from .generate import Stage, load_pipeline
from .processes import Interrupted, interruptible
from .ray_pool import RayPool


class BatchWorker:
    """Generates clips of a batch with a pipeline that it loads once.

    Args:
        batch: the batch; ``out`` is absolute.
        token: name of a file in ``out``, which shows that the folder is shared.

    Raises:
        ValueError: the folder is not shared, or the model cannot be loaded.
    """

    def __init__(self, batch: Batch, token: str) -> None:
        check_shared(batch.out, token)
        self.batch, self.pipe = batch, prepare(load_pipeline(batch.model, options=batch.load))

    def describe(self) -> dict:
        return describe_process()

    def run(self, job: Job) -> None:
        """Generate a clip, or record why it failed. A clip that another batch is generating is waited for."""
        self.batch.generate_missing(self.pipe, job, wait=True)


def run_batch(batch: Batch, stage: Stage, workers: int | None = None) -> dict:
    """Generate the remaining clips of a batch on a Ray cluster, and return the manifest.

    The files are those of `Batch.run`, and either resumes what the other has left. ``manifest.json`` is updated every
    few seconds.

    Args:
        batch: the batch. On several machines its folder must be on storage that all of them share.
        stage: returns the progress callback of a named stage; it counts clips.
        workers: number of processes, as for `RayPool`.

    Raises:
        ValueError: Ray is not installed, or no worker can load the model or sees the folder.
        Interrupted: SIGINT or SIGTERM was received. Finished clips stay valid.
    """
    jobs, progress, folder = batch.jobs(), stage("clips"), batch.folder
    left = [job for job in jobs if not folder.is_done(job.name)]
    live, done = LiveManifest(folder, jobs), len(jobs) - len(left)
    progress(done, len(jobs))

    def count(number: int, _: object = None) -> None:
        nonlocal done
        done += 1
        progress(done, len(jobs))

    def fail(number: int, reason: str) -> None:
        batch.fail(left[number], reason, {})
        count(number)

    with interruptible(lambda: stage("stopping")) as signals:

        def poll() -> None:
            live.update()
            if signals:
                raise Interrupted

        try:
            if left:
                with shared_token(batch.out) as token:
                    make_worker = partial(BatchWorker, replace(batch, out=batch.out.absolute()), token)
                    pool = RayPool(make_worker, workers, at_most=len(left))
                    try:
                        pool.run(left, count, fail, poll)
                    finally:
                        pool.close()
        finally:
            for job in left:  # remove partial files of the workers that were ended
                with folder.locked(job.name):
                    pass
            manifest = folder.write_manifest(jobs)
    return manifest


@contextmanager
def shared_token(folder: Path) -> Iterator[str]:
    """Yield the name of a new file in a folder, by which other machines can tell that they see the folder."""
    path = folder / f".shared-{secrets.token_hex(4)}"
    path.touch()
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)


def check_shared(folder: Path, token: str) -> None:
    """Raise ValueError if this machine does not see the file of `shared_token`."""
    if not (folder / token).exists():
        place = f"{folder} on {socket.gethostname()}"
        raise ValueError(f"{place} is not the folder of this command: choose an --out that all machines share")


def describe_process() -> dict:
    """Return host, process and device."""
    return {"host": socket.gethostname(), "process": os.getpid(), "device": device_name()}
