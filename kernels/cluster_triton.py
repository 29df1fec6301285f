"""The Triton programs behind `cluster`: the nearest centroid of every token, and the mean of every cluster."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles_triton import scattered, tile


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
    WIDTH: tl.constexpr,
    WIDTH_REST: tl.constexpr,
):
    """Labels of ROWS tokens. Pointers: x ``[B, H, N, D]``; centroids ``[B, H, C, D]``; half_squares, half their squared
    lengths, float32 ``[B, H, C]``; labels int64 ``[B, H, N]``. The table of distances never leaves the registers."""
    program = tl.program_id(0)
    tiles = tl.cdiv(tokens, ROWS)
    number, head, item = program % tiles, (program // tiles) % heads, program // (tiles * heads)
    token = number * ROWS + tl.arange(0, ROWS)
    real = token < tokens
    points = scattered(x, x_strides, item, head, token, real, 0, WIDTH)
    points_rest = points
    if WIDTH_REST:
        points_rest = scattered(x, x_strides, item, head, token, real, WIDTH, WIDTH_REST)

    squares = half_squares + (item * heads + head).to(tl.int64) * clusters
    best = tl.full([ROWS], float("-inf"), tl.float32)
    label = tl.zeros([ROWS], tl.int32)
    for start in range(0, clusters, GROUP):
        group = tile(centroids, centroids_strides, item, head, start, clusters, 0, GROUP, WIDTH, False, True)
        scores = tl.dot(points, group.T, input_precision="ieee")
        if WIDTH_REST:
            rest = tile(
                centroids, centroids_strides, item, head, start, clusters, WIDTH, GROUP, WIDTH_REST, False, True
            )
            scores = tl.dot(points_rest, rest.T, scores, input_precision="ieee")
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
    WIDTH: tl.constexpr,
    WIDTH_REST: tl.constexpr,
):
    """The mean of one cluster, or its old centroid where it is empty. Pointers: x ``[B, H, N, D]``; order and edges of
    `Clusters`, ``[B, H, N]`` and ``[B, H, C + 1]``; old, new float32 ``[B, H, C, D]``."""
    program = tl.program_id(0).to(tl.int64)
    place = program // clusters
    head, item = place % heads, place // heads
    bounds = edges + place * (clusters + 1) + program % clusters
    begin, end = tl.load(bounds), tl.load(bounds + 1)
    sums = tl.zeros([WIDTH], tl.float32)
    sums_rest = tl.zeros([max(WIDTH_REST, 1)], tl.float32)
    for start in range(begin, end, ROWS):
        there = start + tl.arange(0, ROWS)
        real = there < end
        token = tl.load(order + place * tokens + there, mask=real, other=0)
        sums += tl.sum(scattered(x, x_strides, item, head, token, real, 0, WIDTH).to(tl.float32), 0)
        if WIDTH_REST:
            rest = scattered(x, x_strides, item, head, token, real, WIDTH, WIDTH_REST)
            sums_rest += tl.sum(rest.to(tl.float32), 0)

    empty, size = begin == end, tl.maximum(end - begin, 1).to(tl.float32)
    columns = program * (WIDTH + WIDTH_REST) + tl.arange(0, WIDTH)
    tl.store(new + columns, tl.where(empty, tl.load(old + columns), sums / size))
    if WIDTH_REST:
        columns = program * (WIDTH + WIDTH_REST) + WIDTH + tl.arange(0, WIDTH_REST)
        tl.store(new + columns, tl.where(empty, tl.load(old + columns), sums_rest / size))
