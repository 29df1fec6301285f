"""Votes on pairs of clips, in a file with one JSON object a line."""

from __future__ import annotations

import logging
import os
from datetime import datetime, timezone
from pathlib import Path
from threading import Lock
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dit_sparse.output.files import writable_folder

Choice = Literal["left", "right", "tie"]
MAX_RATER = 40  # characters of a name
_log = logging.getLogger("dit_sparse")


class Vote(BaseModel):
    """One vote.

    Attributes:
        rater: who voted.
        prompt, seed: of both clips; the seed is None if it is unknown.
        left, right: methods of the clips, as they were shown.
        vote: the clip that looks better, or ``tie``.
        time: UTC, as ISO 8601.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    rater: str = Field(min_length=1, max_length=MAX_RATER)
    prompt: str
    seed: int | None
    left: str
    right: str
    vote: Choice
    time: str = Field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    @model_validator(mode="after")
    def _check_methods(self) -> Vote:
        if self.left == self.right:
            raise ValueError("a method cannot be compared with itself")
        return self

    @property
    def methods(self) -> frozenset[str]:
        return frozenset((self.left, self.right))


class VoteFile:
    """A file of votes. A vote is appended by one system call, so that several raters, and several processes on one
    machine, can use the same file, and an interruption loses at most the vote that was being written.

    Args:
        path: the file; it is created at the first vote.

    Raises:
        ValueError: the path is a folder, or its folder is not writable.
    """

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            raise ValueError(f"the file of votes cannot be the folder {path}")
        writable_folder(path.parent)
        self.path, self._lock = path, Lock()

    def add(self, vote: Vote) -> None:
        line = vote.model_dump_json() + "\n"
        with self._lock:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                size = os.fstat(descriptor).st_size
                if size and self._last_byte() != b"\n":  # a writer was interrupted
                    line = "\n" + line
                os.write(descriptor, line.encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _last_byte(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1)

    def read(self) -> list[Vote]:
        """Return all votes, the oldest first. Lines that are no votes are left out with a warning."""
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        votes, broken = [], 0
        for line in filter(bytes.strip, lines):
            try:
                votes.append(Vote.model_validate_json(line))
            except ValidationError:
                broken += 1
        if broken:
            _log.warning("%d of %d lines of %s are no votes and are left out", broken, broken + len(votes), self.path)
        return votes
