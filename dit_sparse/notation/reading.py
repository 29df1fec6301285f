"""Read input files: regular files of limited size, so that a pipe, a device or a wrong file cannot block the program or
fill the memory."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

MAX_BYTES = 64 * 2**20


def shorten_path(path: Path | str) -> str:
    """Return the path, or its start and end, for messages."""
    text = str(path)
    return text if len(text) <= 100 else f"{text[:50]}...{text[-47:]}"


def check_regular_file(path: Path | str) -> os.stat_result:
    """Return the status of a regular file. Raises ValueError for a folder, pipe or device, or if there is no file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: the path contains a zero byte
        raise ValueError(f"cannot read {shorten_path(path)}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
        raise ValueError(f"cannot read {shorten_path(path)}: it must be a file, but it is {kind}")
    return status


def read_bytes(path: Path | str, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file.

    Raises:
        ValueError: the file cannot be read, is no regular file, or is larger than ``max_bytes``.
    """
    size = check_regular_file(path).st_size
    try:
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)  # files in /proc have the size 0
    except OSError as error:
        raise ValueError(f"cannot read {shorten_path(path)}: {error.strerror}") from None
    if max(size, len(content)) > max_bytes:
        raise ValueError(f"cannot read {shorten_path(path)}: it must have at most {max_bytes / 2**20:g} MiB")
    return content


def read_text(path: Path | str) -> str:
    """Return the content of a UTF-8 file. Raises ValueError as `read_bytes`, or if it is no text."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {shorten_path(path)}: it is not UTF-8 text (byte {error.start})") from None


def read_json(path: Path | str) -> Any:
    """Return the content of a JSON file. Raises ValueError as `read_text`, or if it is not JSON."""
    text = read_text(path)
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"cannot read {shorten_path(path)}: its JSON is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"cannot read {shorten_path(path)}: it is not JSON ({error})") from None
