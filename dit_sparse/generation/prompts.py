"""Prompt files: one prompt per line (.txt), or rows with their own settings (.csv with a header, .jsonl)."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..grid import short_repr
from ..notation.reading import read_bytes, shorten_path
from ..notation.settings import alternatives_to
from .checks import MAX_NUMBER, MAX_PROMPT

MAX_NAME = 80  # characters
RESERVED_NAMES = {"con", "prn", "aux", "nul"} | {f"{port}{number}" for port in ("com", "lpt") for number in range(10)}

Count = Annotated[int | None, Field(gt=0, le=MAX_NUMBER)]
Text = Annotated[str, Field(max_length=MAX_PROMPT)]


class Row(BaseModel):
    """One prompt with its own settings; None: the setting of the batch.

    Attributes:
        prompt, negative_prompt: what the video shows, and what it must not show.
        id: name of the files. Default: number and prompt.
        seed: seed of the first clip.
        method, density, dense_steps: arguments of `SparseAttnProcessor`; the method may be ``radial(sink=true)``,
            ``cached(svg2)`` or ``profile:NAME``.
        steps, frames, height, width, guidance: arguments of the pipeline call.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    prompt: Annotated[Text, BeforeValidator(lambda text: text.strip() if isinstance(text, str) else text)]
    id: Annotated[str | None, Field(max_length=200)] = None
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    negative_prompt: Text | None = None
    method: str | None = None
    density: float | None = None
    dense_steps: int | float | None = None
    steps: Count = None
    frames: Count = None
    height: Count = None
    width: Count = None
    guidance: float | None = None


def read_rows(path: Path | str) -> list[tuple[str, Row]]:
    """Return the rows of a file, each with the name of its output files.

    Raises:
        ValueError: the file cannot be read, a row is invalid, or a name is used twice; the message names the line.
    """
    readers = {".txt": _read_text, ".csv": _read_csv, ".jsonl": _read_jsonl}
    if not isinstance(path, str | Path):
        raise ValueError(f"a prompt file must be a path, got {short_repr(path)}")
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise ValueError(f"a prompt file must be one of {', '.join(readers)}, got {shorten_path(path.name)}")
    rows: dict[str, tuple[int, str, Row]] = {}  # by the name in lower case, because some file systems ignore case
    for line, values in readers[suffix](path):
        row = _validate(path, line, values)
        name = file_name(row, len(rows) + 1)
        if name.lower() in rows:
            raise ValueError(
                f"{shorten_path(path)}, line {line}: the name {name!r} is already used in line {rows[name.lower()][0]}"
            )
        rows[name.lower()] = (line, name, row)
    if not rows:
        raise ValueError(f"there are no prompts in {shorten_path(path)}")
    return [(name, row) for _, name, row in rows.values()]


def file_name(row: Row, number: int) -> str:
    """Return a file name that is safe on every file system, of ASCII letters, digits, ``-``, ``_`` and ``.``. If an id
    had to be changed, a digest of it follows, so that different ids have different names."""
    text = row.id if row.id else f"{number:04d}-{row.prompt}"
    safe = "".join(sign if sign.isascii() and (sign.isalnum() or sign in "-_.") else "_" for sign in text)
    safe = safe.lstrip("._-")[:MAX_NAME].rstrip("._-")
    if safe.partition(".")[0].lower() in RESERVED_NAMES:  # device names on Windows
        safe = f"id-{safe}"
    if row.id and safe != row.id:
        safe = f"{safe}-{hashlib.sha256(row.id.encode()).hexdigest()[:8]}".lstrip("-")
    return safe


def _validate(path: Path, line: int, values: object) -> Row:
    place = f"{shorten_path(path)}, line {line}"
    if not isinstance(values, dict):
        raise ValueError(f'{place}: a row must be an object such as {{"prompt": "a cat"}}')
    for name, value in values.items():
        if name not in Row.model_fields:
            raise ValueError(f"{place}: there is no setting {name[:40]!r}; {alternatives_to(name, Row.model_fields)}")
        if isinstance(value, bool):
            raise ValueError(f"{place}: {name} cannot be {str(value).lower()}")
    try:
        row = Row.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{place}: {first['loc'][0]}: {first['msg']}") from None
    if not row.prompt:
        raise ValueError(f"{place}: the prompt is empty")
    if "\0" in row.prompt + (row.negative_prompt or ""):
        raise ValueError(f"{place}: the prompt contains a zero byte")
    return row


def _read_text(path: Path) -> Iterator[tuple[int, dict]]:
    for line, text in _numbered_lines(path):
        if text.strip():
            yield line, {"prompt": text}


def _read_jsonl(path: Path) -> Iterator[tuple[int, object]]:
    for line, text in _numbered_lines(path):
        if not text.strip():
            continue
        try:
            yield line, json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"{shorten_path(path)}, line {line}: not JSON") from None


def _read_csv(path: Path) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader((text for _, text in _numbered_lines(path)), strict=True)
    try:
        header = [name.strip() for name in reader.fieldnames or ()]
        if "prompt" not in header:
            raise ValueError(f"{shorten_path(path)} needs a header with a column 'prompt', with commas between columns")
        if len(set(header)) < len(header):
            raise ValueError(f"{shorten_path(path)} has two columns of the same name")
        reader.fieldnames = header
        for values in reader:
            if None in values:
                raise ValueError(
                    f"{shorten_path(path)}, line {reader.line_num}: more cells than the header has columns"
                )
            yield reader.line_num, {name: value for name, value in values.items() if value not in ("", None)}
    except csv.Error as error:
        raise ValueError(f"{shorten_path(path)}, line {reader.line_num}: {error}") from None


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file, with or without a byte order mark, and their numbers from 1."""
    for line, piece in enumerate(read_bytes(path).removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        try:
            text = piece.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{shorten_path(path)}, line {line}: not UTF-8; save the file as UTF-8") from None
        if "\0" in text:
            raise ValueError(f"{shorten_path(path)}, line {line}: a zero byte, so this is not a text file")
        yield line, text + "\n"
