"""Loops that the oracle tests share: blocks of tokens, and the selection rules of papers, one row at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_sparse import Grid

BLOCK = 16
GRIDS = [Grid(4, 8, 12), Grid(5, 7, 6, after=27), Grid(3, 7, 11)]  # whole blocks; text; a ragged last block


def blocks_of(grid: Grid, order: Tensor | None = None, block: int = BLOCK) -> list[list[int]]:
    """Return the tokens of each block."""
    tokens = list(range(grid.tokens)) if order is None else order.tolist()
    return [tokens[first : first + block] for first in range(0, grid.tokens, block)]


def is_text(grid: Grid, tokens: list[int]) -> bool:
    """Return whether a block holds text."""
    return any(not grid.before <= token < grid.before + grid.video for token in tokens)


def video_of(grid: Grid, blocks: list[list[int]]) -> list[int]:
    """Return the numbers of the blocks without text."""
    return [number for number, tokens in enumerate(blocks) if not is_text(grid, tokens)]


def mask_of(rows: dict[int, set[int]], blocks: list[list[int]]) -> Tensor:
    """Return the mask of the columns that rows of the video keep, with all rows and columns of text."""
    mask = torch.ones(len(blocks), len(blocks), dtype=torch.bool)
    for row, kept in rows.items():
        for column in rows:
            mask[row, column] = column in kept
    return mask


def ranked(scores: dict[int, float], first: set[int]) -> list[int]:
    """Return the columns from the best to the worst, after those that are kept first."""
    return sorted(first & set(scores)) + sorted(set(scores) - first, key=lambda column: -scores[column])


def top_k(scores: dict[int, float], number: int, own: int) -> set[int]:
    """Return the own column and the best others, ``number`` in all."""
    return set(ranked(scores, {own})[:number])


def top_p(shares: dict[int, float], p: float, own: int | None = None, least: int = 0, most: int = 10**9) -> set[int]:
    """Return the fewest best columns that hold the part ``p`` of all shares, the own one first, within two bounds."""
    columns, total, held, number = ranked(shares, set() if own is None else {own}), sum(shares.values()), 0.0, 0
    while number < len(columns) and (number == 0 or held < p * total):
        held += shares[columns[number]]
        number += 1
    return set(columns[: max(min(number, most), least)])


def attention_map(q: Tensor, k: Tensor) -> Tensor:
    """Return the softmax of all scores of one head, float64 ``[N, N]``."""
    return (q.double() @ k.double().mT / math.sqrt(q.shape[-1])).softmax(-1)
