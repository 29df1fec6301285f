"""Prompt files: a prompt a line (.txt), or rows with settings of their own (.csv with a header, .jsonl)."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

LONGEST_PROMPT = 10_000  # characters
LONGEST_NAME = 80
LARGEST = 100_000  # of steps, frames, pixels
RESERVED = {"con", "prn", "aux", "nul"} | {f"{port}{number}" for port in ("com", "lpt") for number in range(10)}

Count = Annotated[int | None, Field(gt=0, le=LARGEST)]
Text = Annotated[str, Field(max_length=LONGEST_PROMPT)]


class Row(BaseModel):
    """One prompt, and what is special about it; None: as for all.

    Attributes:
        prompt, negative_prompt: what to show, and what not.
        id: names the files; without one they are named by number and prompt.
        seed: of the first clip.
        method, density, dense_steps: as for `SparseAttnProcessor`.
        steps, frames, height, width, guidance: arguments of the pipeline.
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


def read_rows(path: Path) -> list[tuple[str, Row]]:
    """The rows of a file, each with the name that its files are to bear.

    Raises:
        ValueError: the file cannot be read, a row is wrong or names are there twice; the message says which line.
    """
    readers = {".txt": _lines, ".csv": _table, ".jsonl": _objects}
    kind = path.suffix.lower()
    if kind not in readers:
        raise ValueError(f"prompts come as {', '.join(readers)}, not {path.name}")
    found: dict[str, tuple[int, Row]] = {}
    names = []
    for line, values in readers[kind](path):
        row = _row(path, line, values)
        name = file_name(row, len(names) + 1)
        if name.lower() in found:  # some file systems do not tell them apart
            raise ValueError(f"{path}, line {line}: {name!r} is the name of line {found[name.lower()][0]} too")
        found[name.lower()] = (line, row)
        names.append(name)
    if not names:
        raise ValueError(f"there are no prompts in {path}")
    return [(name, row) for name, (_, row) in zip(names, found.values(), strict=True)]


def file_name(row: Row, number: int) -> str:
    """A name that is safe in any folder: letters, digits, ``-``, ``_`` and ``.``, none of them a path. What had to be
    changed in an id is followed by a digest of it, so that different ids have different names."""
    told = row.id if row.id else f"{number:04d}-{row.prompt}"
    safe = "".join(sign if sign.isascii() and (sign.isalnum() or sign in "-_.") else "_" for sign in told)
    safe = safe.lstrip("._-")[:LONGEST_NAME].rstrip("._-")
    if safe.partition(".")[0].lower() in RESERVED:  # names of devices on Windows
        safe = f"id-{safe}"
    if row.id and safe != row.id:
        safe = f"{safe}-{hashlib.sha256(row.id.encode()).hexdigest()[:8]}".lstrip("-")
    return safe


def _row(path: Path, line: int, values: object) -> Row:
    place = f"{path}, line {line}"
    if not isinstance(values, dict):
        raise ValueError(f'{place}: a row is an object such as {{"prompt": "a cat"}}')
    for name, value in values.items():
        if name not in Row.model_fields:
            raise ValueError(f"{place}: there is no setting {name[:40]!r}; there are {', '.join(Row.model_fields)}")
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
        raise ValueError(f"{place}: a zero byte in the prompt")
    return row


def _lines(path: Path) -> Iterator[tuple[int, dict]]:
    for line, text in _text(path):
        if text.strip():
            yield line, {"prompt": text}


def _objects(path: Path) -> Iterator[tuple[int, object]]:
    for line, text in _text(path):
        if not text.strip():
            continue
        try:
            yield line, json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"{path}, line {line}: this is no JSON") from None


def _table(path: Path) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader((text for _, text in _text(path)), strict=True)
    try:
        header = [name.strip() for name in reader.fieldnames or ()]
        if "prompt" not in header:
            raise ValueError(f"{path} needs a header with a column 'prompt', and commas between columns")
        if len(set(header)) < len(header):
            raise ValueError(f"{path} has two columns of the same name")
        reader.fieldnames = header
        for values in reader:
            if None in values:
                raise ValueError(f"{path}, line {reader.line_num}: more cells than the header has")
            yield reader.line_num, {name: value for name, value in values.items() if value not in ("", None)}
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None


def _text(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, from 1; UTF-8, with or without a mark of it, and with any kind of line ends."""
    try:
        raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    for line, piece in enumerate(raw.splitlines(), 1):
        try:
            text = piece.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{path}, line {line}: this is not UTF-8; save the file as UTF-8") from None
        if "\0" in text:
            raise ValueError(f"{path}, line {line}: a zero byte; this is no text")
        yield line, text + "\n"
