"""Write results: folders are checked before long work, and files are replaced atomically."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..notation.reading import shorten_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_NAME_BYTES = 255  # of a file name, on all common file systems


def writable_folder(path: Path | str, names: Iterable[str] = ()) -> Path:
    """Create a folder if it does not exist, and return it.

    Args:
        path: the folder.
        names: files that will be written into it.

    Raises:
        ValueError: the folder or one of the files cannot be written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for name in names:
            _check_replaceable(folder / name)
    except (OSError, ValueError) as error:  # ValueError: the path contains a zero byte
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"cannot write into {shorten_path(folder)}: {reason}; choose another folder with --out"
        ) from None
    return folder


def writable_file(path: Path | str, option: str = "--out") -> Path:
    """Create the folder of a file if it does not exist, and return the path. Raises ValueError if the file cannot be
    written."""
    file = Path(path)
    if not file.name or os.path.isdir(file):
        raise ValueError(f"{option} must be a file, got the folder {shorten_path(file)}")
    writable_folder(file.parent)
    try:
        _check_replaceable(file)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{option} cannot be {shorten_path(file)}: {reason}") from None
    return file


def writable_figure(path: Path | str, option: str = "--out") -> Path:
    """Return the path as `writable_file` does. Raises ValueError also if matplotlib has no format of its suffix."""
    from matplotlib.backend_bases import FigureCanvasBase

    file, formats = Path(path), sorted(FigureCanvasBase.get_supported_filetypes())
    if file.suffix.lstrip(".").lower() not in formats:
        raise ValueError(f"{option} must end in .{', .'.join(formats)}, got {shorten_path(file)}")
    return writable_file(file, option)


def _check_replaceable(path: Path) -> None:
    """Raise OSError or ValueError if a file of this name cannot be created or replaced."""
    for each in (_temporary_path(path), path):  # a name that is too long for the file system raises OSError
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(each).st_mode):
                raise ValueError(f"{path.name} exists and is not a file")


def _temporary_path(path: Path) -> Path:
    """Return an unused hidden path in the same folder. It is not longer than the file system allows if ``path`` is
    not."""
    stem = os.fsdecode(os.fsencode(path.stem)[: MAX_NAME_BYTES - len(".") - 7 - len(os.fsencode(path.suffix))])
    return path.with_name(f".{stem}.{secrets.token_hex(3)}{path.suffix}")


def partial_files(folder: Path, name: str) -> list[Path]:
    """Return the temporary files that `atomic_write` created for JSON files and videos of this name."""
    pattern = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{6}}\.(mp4|json)")
    return [path for path in folder.glob(".*") if pattern.fullmatch(path.name)]


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder. At the end it replaces ``path``; after an error it is removed."""
    temporary = _temporary_path(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_figure(path: Path, figure: Figure, metadata: dict[str, str] | None = None) -> None:
    """Write a matplotlib figure in the format of the suffix, such as .png or .svg, with metadata of this format."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, metadata=metadata)


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
    """Return frames as uint8; floats are in [0, 1]. Raises ValueError if a value is NaN or infinite."""
    if frames.dtype == np.uint8:
        return frames
    if not np.isfinite(frames).all():
        share = 1 - np.isfinite(frames).mean()
        raise ValueError(f"{share:.0%} of the values of the frames are NaN or infinite, so there is no video to write")
    return (frames.clip(0, 1) * 255).round().astype(np.uint8)
