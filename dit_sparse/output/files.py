"""Write results: folders are checked before long work, and files are replaced atomically."""

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
    """Create a folder if it does not exist, and return it. Raises ValueError if it is not writable."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error.strerror}; choose another folder with --out") from None
    return folder


def writable_file(path: Path | str, option: str = "--out") -> Path:
    """Create the folder of a file if it does not exist, and return the path. Raises ValueError if the file cannot be
    written."""
    file = Path(path)
    if not file.name or file.is_dir():
        raise ValueError(f"{option} must be a file, got the folder {file}")
    writable_folder(file.parent)
    return file


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder. At the end it replaces ``path``; after an error it is removed."""
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(3)}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_figure(path: Path, figure: Figure) -> None:
    """Write a matplotlib figure in the format of the suffix, such as .png or .svg."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary)


def save_json(path: Path, value: dict) -> None:
    """Write a JSON file. Infinity becomes ``"inf"`` and NaN null, see `json_values`."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(json_values(value), indent=2, allow_nan=False) + "\n")


def json_values(value: Any) -> Any:
    """Return plain values that JSON can hold: infinity becomes ``"inf"``, which ``float`` reads back, and NaN None."""
    if isinstance(value, dict):
        return {key: json_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def to_uint8(frames: NDArray) -> NDArray:
    """Return frames as uint8; floats are in [0, 1]."""
    return frames if frames.dtype == np.uint8 else (frames.clip(0, 1) * 255).round().astype(np.uint8)
