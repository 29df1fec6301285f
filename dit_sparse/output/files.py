"""Writing results: the folder is checked before long work, and no half-written file is left behind."""

from __future__ import annotations

import json
import math
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def writable_folder(path: Path | str) -> Path:
    """The folder, made if need be. Raises ValueError where nothing can be written."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error.strerror}; choose another folder with --out") from None
    return folder


def writable_file(path: Path | str, option: str = "--out") -> Path:
    """The path of a file, its folder made if need be. Raises ValueError where no such file can be written."""
    file = Path(path)
    if not file.name or file.is_dir():
        raise ValueError(f"{option} names a file, and {file} is a folder")
    writable_folder(file.parent)
    return file


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to; it takes the place of ``path`` at the end, or vanishes on an error."""
    draft = path.with_name(f".{path.stem}.{secrets.token_hex(3)}{path.suffix}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def save_figure(path: Path, figure: Figure) -> None:
    """Write a matplotlib figure in the format of the suffix, such as .png or .svg."""
    with atomic_write(path) as draft:
        figure.savefig(draft)


def save_json(path: Path, value: dict) -> None:
    with atomic_write(path) as draft:
        draft.write_text(json.dumps(for_json(value), indent=2, allow_nan=False) + "\n")


def for_json(value: Any) -> Any:
    """Plain values as JSON knows them: infinity becomes ``"inf"``, which ``float`` reads back, and what is no number
    None."""
    if isinstance(value, dict):
        return {key: for_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [for_json(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def to_uint8(frames: NDArray) -> NDArray:
    """Floats in 0..1 to bytes."""
    return frames if frames.dtype == np.uint8 else (frames.clip(0, 1) * 255).round().astype(np.uint8)
