"""Which pair of clips a rater sees next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from random import Random
from typing import NamedTuple

from .clip_source import ClipSource, PromptSeed
from .votes import Vote


class Pair(NamedTuple):
    """Two clips of one prompt and seed, in the order in which they are shown."""

    sample: PromptSeed
    left: str
    right: str

    @property
    def key(self) -> tuple[PromptSeed, frozenset[str]]:
        """The pair without its order."""
        return self.sample, frozenset((self.left, self.right))


def all_pairs(source: ClipSource) -> Iterator[Pair]:
    """Yield every pair of methods with every prompt and seed of which both have a clip."""
    for left, right in combinations(source.methods, 2):
        for sample in source.samples_of(left, right):
            yield Pair(sample, left, right)


def next_pair(source: ClipSource, votes: Sequence[Vote], rater: str, random: Random) -> Pair | None:
    """Return a pair that this rater has not voted on, in random order; None if there is none.

    The pair of methods with the fewest votes comes first, then the prompt and seed with the fewest votes on it; chance
    decides between equals. So all methods are compared with each other from the start, whenever raters stop.
    """
    key_of = lambda vote: (PromptSeed(vote.prompt, vote.seed), vote.methods)
    seen = {key_of(vote) for vote in votes if vote.rater == rater}
    remaining = [pair for pair in all_pairs(source) if pair.key not in seen]
    if not remaining:
        return None
    of_methods, of_pair = Counter(vote.methods for vote in votes), Counter(map(key_of, votes))
    random.shuffle(remaining)
    pair = min(remaining, key=lambda pair: (of_methods[pair.key[1]], of_pair[pair.key]))
    return Pair(pair.sample, pair.right, pair.left) if random.random() < 0.5 else pair


def progress(source: ClipSource, votes: Sequence[Vote], rater: str) -> tuple[int, int]:
    """Return how many pairs a rater has voted on, and how many there are."""
    pairs = {pair.key for pair in all_pairs(source)}
    voted = {(PromptSeed(vote.prompt, vote.seed), vote.methods) for vote in votes if vote.rater == rater}
    return len(voted & pairs), len(pairs)
