"""The clips of a comparison, kept one by one: a run that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from dit_sparse.output.files import atomic_write, writable_folder


@dataclass(frozen=True)
class ClipRecord:
    """One finished clip.

    Attributes:
        frames: ``[F, H, W, 3]`` uint8.
        note: what was measured while it was made, plain values for JSON.
        latents: float16 ``[looks, ...]``, the latents after some of the steps; only of clips that others are compared
            with.
    """

    frames: NDArray
    note: dict
    latents: NDArray | None = field(default=None, repr=False)


class ClipStore:
    """A folder of takes, each found by everything that decides it: model, call, prompt, seed, method, versions. What
    one of these changes is another take, so a folder can be used again, for the same comparison or for a larger one."""

    def __init__(self, folder: Path) -> None:
        self.folder = writable_folder(folder)

    def get(self, name: str, decides: dict) -> ClipRecord | None:
        """The take, or None where there is none that can be read."""
        return _read(self._path(name, decides))

    def put(self, name: str, decides: dict, take: ClipRecord) -> None:
        """Store a take; killed in between, it leaves none."""
        arrays = {"frames": take.frames, "note": np.array(json.dumps(take.note))}
        if take.latents is not None:
            arrays["latents"] = take.latents
        with atomic_write(self._path(name, decides)) as draft, draft.open("wb") as file:
            np.savez(file, **arrays)

    def takes(self) -> Iterator[ClipRecord]:
        """All that are there and can be read, the oldest first."""
        for path in sorted(self.folder.glob("[!.]*.npz"), key=lambda path: path.stat().st_mtime_ns):
            if (take := _read(path)) is not None:
                yield take

    def _path(self, name: str, decides: dict) -> Path:
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
        readable = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in name)[:60]
        return self.folder / f"{readable}-{digest}.npz"


def _read(path: Path) -> ClipRecord | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return ClipRecord(stored["frames"], json.loads(str(stored["note"])), stored.get("latents"))
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, RuntimeError):
        return None
