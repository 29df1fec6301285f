"""The Triton programs behind `cluster`: the nearest centroid of every token, and the mean of every cluster."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import first, products, scattered, width


@triton.jit
def assign(
    x,
    centroids,
    half_squares,
    labels,
    x_strides,
    centroids_strides,
    heads,
    tokens,
    clusters,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTHS: tl.constexpr,
):
    """Labels of ROWS tokens. Pointers: x ``[B, H, N, D]``; centroids ``[B, H, C, D]``; half_squares, half their squared
    lengths, float32 ``[B, H, C]``; labels int64 ``[B, H, N]``. The table of distances never leaves the registers."""
    program = tl.program_id(0)
    tiles = tl.cdiv(tokens, ROWS)
    number, head, item = program % tiles, (program // tiles) % heads, program // (tiles * heads)
    token = number * ROWS + tl.arange(0, ROWS)
    real = token < tokens
    points = scattered(x, x_strides, item, head, token, real, WIDTHS)

    squares = half_squares + (item * heads + head).to(tl.int64) * clusters
    best = tl.full([ROWS], float("-inf"), tl.float32)
    label = tl.zeros([ROWS], tl.int32)
    for start in range(0, clusters, GROUP):
        scores = products(
            points, (centroids,), centroids_strides, item, head, start, clusters, GROUP, WIDTHS, False, True
        )
        there = start + tl.arange(0, GROUP)
        scores -= tl.load(squares + there, mask=there < clusters, other=float("inf"))[None, :]
        highest, place = tl.max(scores, 1, return_indices=True)
        label = tl.where(highest > best, start + place, label)
        best = tl.maximum(best, highest)
    tl.store(labels + (item * heads + head).to(tl.int64) * tokens + token, label.to(tl.int64), mask=real)


@triton.jit
def means(
    x,
    order,
    edges,
    old,
    new,
    x_strides,
    heads,
    tokens,
    clusters,
    ROWS: tl.constexpr,
    WIDTHS: tl.constexpr,
):
    """The mean of one cluster, or its old centroid where it is empty. Pointers: x ``[B, H, N, D]``; order and edges of
    `Clusters`, ``[B, H, N]`` and ``[B, H, C + 1]``; old, new float32 ``[B, H, C, D]``."""
    program = tl.program_id(0).to(tl.int64)
    place = program // clusters
    head, item = place % heads, place // heads
    bounds = edges + place * (clusters + 1) + program % clusters
    begin, end = tl.load(bounds), tl.load(bounds + 1)
    sums = ()
    for i in tl.static_range(len(WIDTHS)):
        sums = sums + (tl.zeros([width(WIDTHS, i)], tl.float32),)
    for start in range(begin, end, ROWS):
        there = start + tl.arange(0, ROWS)
        real = there < end
        token = tl.load(order + place * tokens + there, mask=real, other=0)
        rows = scattered(x, x_strides, item, head, token, real, WIDTHS)
        added = ()
        for i in tl.static_range(len(WIDTHS)):
            added = added + (sums[i] + tl.sum(rows[i].to(tl.float32), 0),)
        sums = added

    empty, size = begin == end, tl.maximum(end - begin, 1).to(tl.float32)
    for i in tl.static_range(len(WIDTHS)):
        columns = program * first(WIDTHS, len(WIDTHS)) + first(WIDTHS, i) + tl.arange(0, width(WIDTHS, i))
        tl.store(new + columns, tl.where(empty, tl.load(old + columns), sums[i] / size))
