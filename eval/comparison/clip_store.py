"""A folder of generated clips, so that an interrupted comparison resumes and a larger one reuses earlier clips."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dit_sparse.output.files import atomic_write, writable_folder


@dataclass(frozen=True)
class ClipRecord:
    """One generated clip.

    Attributes:
        frames: ``[F, H, W, 3]`` uint8.
        metadata: prompt, seed and measurements, as plain values for JSON.
        latents: float16 ``[steps, ...]``, the latents after some of the steps; only for clips that serve as reference.
    """

    frames: NDArray
    metadata: dict
    latents: NDArray | None = field(default=None, repr=False)


class ClipStore:
    """A folder of clips. The key of a clip holds everything that affects it: model, call, prompt, seed, method,
    versions. A clip with another key is another file, so several comparisons can share a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = writable_folder(folder)

    def get(self, name: str, key: dict) -> ClipRecord | None:
        """Return a clip, or None if it is missing or damaged."""
        return _read(self._path(name, key))

    def put(self, name: str, key: dict, clip: ClipRecord) -> None:
        """Store a clip atomically."""
        arrays = {"frames": clip.frames, "note": np.array(json.dumps(clip.metadata))}
        if clip.latents is not None:
            arrays["latents"] = clip.latents
        with atomic_write(self._path(name, key)) as draft, draft.open("wb") as file:
            np.savez(file, **arrays)

    def clips(self) -> Iterator[ClipRecord]:
        """Yield all readable clips, the oldest first."""
        for path, _ in self.index():
            if (clip := self.load(path)) is not None:
                yield clip

    def index(self) -> list[tuple[Path, dict]]:
        """Return file and metadata of all readable clips, the oldest first, without reading their frames."""
        paths = sorted(self.folder.glob("[!.]*.npz"), key=lambda path: path.stat().st_mtime_ns)
        found = ((path, _read(path, frames=False)) for path in paths)
        return [(path, clip.metadata) for path, clip in found if clip is not None]

    def load(self, path: Path) -> ClipRecord | None:
        """Return the clip of a file of the index, or None if it is damaged."""
        return _read(path)

    def _path(self, name: str, key: dict) -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        readable = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in name)[:60]
        return self.folder / f"{readable}-{digest}.npz"


def _read(path: Path, frames: bool = True) -> ClipRecord | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            metadata = json.loads(str(stored["note"]))
            if not frames:
                return ClipRecord(np.empty(0), metadata)
            return ClipRecord(stored["frames"], metadata, stored.get("latents"))
    except Exception:  # numpy, zipfile and zlib have many errors for damaged files
        return None
