"""A blind test in progress: the pairs that raters see, and their votes. Nothing that they receive names a method."""

from __future__ import annotations

import logging
import secrets
from collections import OrderedDict
from pathlib import Path
from random import SystemRandom
from threading import Lock
from typing import NamedTuple

from ..eval.preference.clip_source import ClipSource, PromptSeed
from ..eval.preference.pairing import Pair, next_pair, progress
from ..eval.preference.votes import MAX_RATER, Choice, Vote, VoteFile
from ..output.media import save_video

MAX_VIEWS = 10_000  # pairs that are shown and wait for a vote
_log = logging.getLogger("dit_sparse")


class View(NamedTuple):
    """A pair as a rater sees it.

    Attributes:
        token: what the vote on it must contain; random.
        left, right: videos with random names.
    """

    token: str
    prompt: str
    left: Path
    right: Path


class BlindTest:
    """Shows pairs of clips and stores votes, for any number of raters at once.

    Args:
        source: the clips.
        votes: the file of votes. Pairs that a rater has voted on there are not shown again.
        folder: where videos are written. All are encoded alike, with H.264, so that files differ in nothing but the
            pictures.
    """

    def __init__(self, source: ClipSource, votes: VoteFile, folder: Path) -> None:
        self.source, self.votes, self.folder = source, votes, folder
        self._random, self._lock, self._encoding = SystemRandom(), Lock(), Lock()
        self._views: OrderedDict[str, tuple[str, Pair]] = OrderedDict()
        self._videos: dict[tuple[str, PromptSeed], Path] = {}
        self._unreadable: set[tuple[str, PromptSeed]] = set()

    def show(self, rater: str) -> View | None:
        """Return the next pair of a rater, None if there is none left.

        A clip that cannot be read is logged and left out. Nothing about it reaches the rater.
        """
        while pair := next_pair(self._readable(), self.votes.read(), rater, self._random):
            try:
                left, right = (self._video(method, pair.sample) for method in (pair.left, pair.right))
            except (OSError, ValueError):
                continue
            token = secrets.token_hex(16)
            with self._lock:
                self._views[token] = rater, pair
                while len(self._views) > MAX_VIEWS:
                    self._views.popitem(last=False)
            return View(token, pair.sample.prompt, left, right)
        return None

    def vote(self, token: str, choice: Choice) -> str | None:
        """Store the vote on a view, and return its rater; None if the view is unknown or has a vote already."""
        with self._lock:
            rater, pair = self._views.pop(token, (None, None))
        if pair is None:
            return None
        self.votes.add(Vote(rater=rater, **pair.sample._asdict(), left=pair.left, right=pair.right, vote=choice))
        return rater

    def progress(self, rater: str) -> tuple[int, int]:
        """Return how many pairs a rater has voted on, and how many there are."""
        return progress(self._readable(), self.votes.read(), rater)

    def _readable(self) -> ClipSource:
        if not self._unreadable:
            return self.source
        keep = lambda method, clips: {key: clip for key, clip in clips.items() if (method, key) not in self._unreadable}
        return ClipSource({method: keep(method, clips) for method, clips in self.source.clips.items()})

    def _video(self, method: str, sample: PromptSeed) -> Path:
        """Return the video of a clip; it is written at the first call."""
        with self._encoding:
            if (method, sample) not in self._videos:
                path = self.folder / f"{secrets.token_hex(16)}.mp4"
                try:
                    save_video(path, *self.source.read(method, sample))
                except (OSError, ValueError) as error:
                    _log.warning("the clip of %s for %r is left out: %s", method, sample.prompt, error)
                    self._unreadable.add((method, sample))
                    raise
                self._videos[method, sample] = path
            return self._videos[method, sample]


def rater_name(text: str) -> str:
    """Return the name of a rater from the text of the form: printable and short; a random one for an empty text."""
    name = " ".join("".join(letter if letter.isprintable() else " " for letter in text or "").split())
    return name[:MAX_RATER].strip() or f"rater-{secrets.token_hex(3)}"
