"""Ranking of methods by a Bradley-Terry model of votes.

R. A. Bradley, M. E. Terry, "Rank analysis of incomplete block designs", Biometrika 39, 1952: method i is preferred to
method j with probability 1 / (1 + exp(s_j - s_i)). The strengths s are fitted by the package ``choix``. A tie counts as
half a vote for each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.sparse.csgraph import connected_components

from .votes import Vote

PRIOR = 0.1  # votes for each side of every compared pair
RESAMPLES = 500
REFERENCE = "dense"


@dataclass(frozen=True)
class Strength:
    """Strength of one method.

    Attributes:
        group: number of the group of methods that votes connect; strengths compare only within a group.
        votes, wins, ties, losses: numbers of votes.
        strength: log-odds of being preferred to the reference, which has 0.
        interval: 95 % bootstrap interval of the strength over prompts, ``[low, high]``; None for a single prompt.
        preferred: probability of being preferred to the reference.
    """

    method: str
    group: int
    votes: int
    wins: int
    ties: int
    losses: int
    strength: float
    interval: list[float] | None
    preferred: float


@dataclass(frozen=True)
class Ranking:
    """Strengths of methods, the strongest first, group by group.

    Attributes:
        rows: the methods.
        references: the method with strength 0 in each group; None: the mean of the group has strength 0.
        votes, raters, prompts: numbers.
        notes: sentences about what the votes cannot tell.
    """

    rows: list[Strength]
    references: list[str | None]
    votes: int
    raters: int
    prompts: int
    notes: list[str]

    def as_dict(self) -> dict:
        return asdict(self)


def rank(votes: Sequence[Vote], reference: str = REFERENCE) -> Ranking:
    """Return the ranking of the methods that have votes.

    A tenth of a vote is added for each side of every compared pair, so that a method that won or lost all of its votes
    has a finite strength. Intervals resample whole prompts, with all their votes, because votes on one prompt depend
    on each other; that raters differ is not part of them.

    Args:
        votes: at least one.
        reference: the method with strength 0, in its group.

    Raises:
        ValueError: there are no votes, or the package ``choix`` is not installed.
    """
    if not votes:
        raise ValueError("there are no votes to rank: collect some with dit-sparse ab")
    names = sorted({name for vote in votes for name in vote.methods})
    wins = _wins_by_prompt(votes, names)
    compared = wins.sum(0) + wins.sum(0).T > 0
    count, labels = connected_components(compared, directed=False)
    members = sorted((np.flatnonzero(labels == group) for group in range(count)), key=lambda group: -len(group))
    rows, references = [], []
    for group, indices in enumerate(members):
        inner = [names[i] for i in indices]
        references.append(reference if reference in inner else None)
        fitted = _fit_group(wins[:, indices][:, :, indices], inner, references[-1])
        rows += sorted((_row(*each, group, votes) for each in fitted), key=lambda row: -row.strength)
    raters, prompts = len({vote.rater for vote in votes}), wins.shape[0]
    one_sided = connected_components(wins.sum(0) > 0, connection="strong")[0] > count
    return Ranking(rows, references, len(votes), raters, prompts, _notes(rows, prompts, one_sided))


def _wins_by_prompt(votes: Sequence[Vote], names: Sequence[str]) -> NDArray:
    """Return the wins of method i against method j on prompt p, ``[P, M, M]``; a tie is half a win for both."""
    prompts = sorted({vote.prompt for vote in votes})
    wins = np.zeros((len(prompts), len(names), len(names)))
    for vote in votes:
        p, left, right = prompts.index(vote.prompt), names.index(vote.left), names.index(vote.right)
        share = {"left": 1.0, "tie": 0.5, "right": 0.0}[vote.vote]
        wins[p, left, right] += share
        wins[p, right, left] += 1 - share
    return wins


def _fit_group(wins: NDArray, names: Sequence[str], reference: str | None) -> list[tuple[str, float, list | None]]:
    """Return name, strength and interval of connected methods from their wins by prompt ``[P, M, M]``."""
    try:
        from choix import ilsr_pairwise_dense
    except ImportError:
        raise ValueError("the ranking needs the package choix: run pip install -e '.[demo]'") from None
    prior = PRIOR * (wins.sum(0) + wins.sum(0).T > 0)

    def fit(prompts: NDArray) -> NDArray:
        strengths = ilsr_pairwise_dense(wins[prompts].sum(0) + prior, max_iter=100_000, tol=1e-6)
        return strengths - (strengths.mean() if reference is None else strengths[names.index(reference)])

    everything = np.arange(len(wins))
    strengths = fit(everything)
    intervals: list[list | None] = [None] * len(names)
    if len(wins) > 1:
        generator = np.random.default_rng(0)
        settings = {"n_resamples": RESAMPLES, "method": "percentile", "vectorized": False, "rng": generator}
        bounds = stats.bootstrap((everything,), fit, **settings).confidence_interval
        intervals = [[float(low), float(high)] for low, high in zip(*bounds, strict=True)]
    return list(zip(names, map(float, strengths), intervals, strict=True))


def _row(method: str, strength: float, interval: list | None, group: int, votes: Sequence[Vote]) -> Strength:
    own = [vote for vote in votes if method in vote.methods]
    results = Counter("tie" if v.vote == "tie" else (v.left if v.vote == "left" else v.right) == method for v in own)
    counts = (len(own), results[True], results["tie"], results[False])
    return Strength(method, group, *counts, strength, interval, 1 / (1 + math.exp(-strength)))


def _notes(rows: Sequence[Strength], prompts: int, one_sided: bool) -> list[str]:
    groups = [", ".join(row.method for row in rows if row.group == number) for number in range(1 + rows[-1].group)]
    notes = []
    if len(groups) > 1:
        notes.append(
            f"No vote connects these groups, so strengths compare only within each: {'; '.join(groups)}. "
            "Collect votes between them."
        )
    if one_sided:
        won = [f"{row.method} won every vote" for row in rows if row.wins == row.votes]
        lost = [f"{row.method} lost every vote" for row in rows if row.losses == row.votes]
        reason = ", ".join(won + lost) or "some methods never lost to others"
        notes.append(f"More votes are needed: {reason}, so only the prior of {PRIOR:g} votes keeps strengths finite.")
    if prompts < 2:
        notes.append("All votes are on one prompt, so there are no intervals.")
    return notes
