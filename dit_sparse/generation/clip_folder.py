"""The folder of a batch: a video and a JSON file for each clip, locks, and the manifest.

The JSON file of a clip is written last, so a clip without it is not done. While a clip is generated, its lock file
contains the start, host, process and device, which the manifest shows. The lock prevents other processes from
generating the clip or removing its partial files; the lock of a process that was killed is free.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch

from ..notation.reading import check_regular_file, read_json
from ..output.environment import device_name
from ..output.files import partial_files, save_json
from ..output.media import check_video
from .processes import file_lock

STATUSES = ("done", "failed", "running", "missing")
SECONDS_BETWEEN_MANIFESTS = 5.0  # while clips are generated
MANIFEST_TIME_SHARE = 0.02  # at most this share of the time is spent on the manifest of a running batch


class NamedClip(Protocol):
    """A clip of a batch: the name of its files, and its settings as plain values."""

    name: str
    settings: dict


@dataclass(frozen=True)
class ClipFolder:
    """Files of the clips of a batch."""

    path: Path

    def file(self, name: str, kind: str) -> Path:
        return self.path / f"{name}.{kind}"

    @contextmanager
    def locked(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Hold the lock of a clip or of the manifest, and remove its partial files, left by killed processes. Yields
        whether the lock was acquired."""
        with file_lock(self._lock(name), wait) as acquired:
            for path in partial_files(self.path, name) if acquired else ():
                path.unlink(missing_ok=True)
            yield acquired

    def announce(self, name: str, measured: dict) -> None:
        """Write into the lock file, which this process holds, where and since when a clip is generated."""
        if self._lock(name).exists():  # there is none where files cannot be locked
            self._lock(name).write_text(json.dumps(measured))

    def result(self, name: str) -> dict | None:
        """Return the content of a clip's JSON file, or None if the file or the video of a finished clip is missing or
        damaged."""
        try:
            result = read_json(self.file(name, "json"))
        except ValueError:
            return None
        if not isinstance(result, dict) or "status" not in result:
            return None
        damaged = result["status"] == "done" and not _is_intact(self.file(name, "mp4"), result.get("video_sha256"))
        return None if damaged else result

    def is_done(self, name: str) -> bool:
        return (self.result(name) or {}).get("status") == "done"

    def manifest(self, clips: Sequence[NamedClip], live: bool = False) -> dict:
        """Return the results of all clips and their number by status.

        Args:
            clips: in the order of the manifest.
            live: also find the clips that a process generates now. Clips of a killed process count as well, until
                their lock is acquired again.
        """
        entries = []
        for clip in clips:
            result = (live and self._running(clip)) or self.result(clip.name)
            entries.append({"name": clip.name} | (result or {"status": "missing", "asked": clip.settings}))
        counts = {status: sum(entry["status"] == status for entry in entries) for status in STATUSES}
        if not counts["running"]:
            del counts["running"]
        return {"count": counts, "clips": entries}

    def write_manifest(self, clips: Sequence[NamedClip]) -> dict:
        """Write the status of all clips to ``manifest.json`` at the end of a batch and return it."""
        with self.locked("manifest", wait=True):
            manifest, counts = self.manifest(clips), None
            while manifest["count"] != counts:  # another process may have finished a clip meanwhile
                save_json(self.file("manifest", "json"), manifest)
                counts, manifest = manifest["count"], self.manifest(clips)
        if counts["done"] == len(clips):  # an encoder can outlive the process that was killed
            for clip in clips:
                with self.locked(clip.name):
                    pass
        return manifest

    def _running(self, clip: NamedClip) -> dict | None:
        try:
            return {"status": "running", **json.loads(self._lock(clip.name).read_text()), "asked": clip.settings}
        except (OSError, ValueError, TypeError):
            return None

    def _lock(self, name: str) -> Path:
        return self.path / f".{name}.lock"


class LiveManifest:
    """Writes the manifest of a running batch from time to time, so that it can be followed."""

    def __init__(self, folder: ClipFolder, clips: Sequence[NamedClip]) -> None:
        self.folder, self.clips = folder, clips
        self._next = 0.0

    def update(self) -> None:
        """Write the manifest if the last time is long ago; not if another process of the batch writes it now."""
        if (begin := time.monotonic()) < self._next:
            return
        with self.folder.locked("manifest") as acquired:
            if acquired:
                save_json(self.folder.file("manifest", "json"), self.folder.manifest(self.clips, live=True))
        spent = time.monotonic() - begin
        self._next = begin + max(SECONDS_BETWEEN_MANIFESTS, spent / MANIFEST_TIME_SHARE)


def begin_measurement() -> dict:
    """Return where and since when a clip is generated, and reset the peak of the GPU memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return {"start": _now(), "host": socket.gethostname(), "process": os.getpid(), "device": device_name()}


def end_measurement(measured: dict) -> dict:
    """Return a measurement with its end and the peak memory: of the GPU since the start, or of the process in RAM since
    the process started; in bytes, None on systems that do not report it."""
    return measured | {"end": _now(), "peak_memory": _peak_memory()}


def _peak_memory() -> int | None:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def same_settings(stored: Any, settings: Any) -> bool:
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
