"""Triton kernels of `planning/cluster.py`: the nearest centroid of every token, and the mean of every cluster."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import dot_rows, gather_rows, split_program_id, tile_offset, tile_width


@triton.jit
def nearest_centroid_kernel(
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
    CENTROIDS: tl.constexpr,
    WIDTHS: tl.constexpr,
):
    """Compute the labels of ROWS tokens, CENTROIDS centroids at a time. Distances are never stored.

    Args:
        x: ``[B, H, N, D]``.
        centroids: ``[B, H, C, D]``.
        half_squares: half the squared norm of each centroid, float32 ``[B, H, C]``.
        labels: int64 ``[B, H, N]``.
    """
    number, head, item = split_program_id(tl.program_id(0), tl.cdiv(tokens, ROWS), heads)
    token = number * ROWS + tl.arange(0, ROWS)
    valid = token < tokens
    points = gather_rows(x, x_strides, item, head, token, valid, WIDTHS)

    half_squares_row = half_squares + (item * heads + head).to(tl.int64) * clusters
    best = tl.full([ROWS], float("-inf"), tl.float32)
    label = tl.zeros([ROWS], tl.int32)
    for start in range(0, clusters, CENTROIDS):
        scores = dot_rows(
            points, (centroids,), centroids_strides, item, head, start, clusters, CENTROIDS, WIDTHS, False, True
        )
        cluster = start + tl.arange(0, CENTROIDS)
        scores -= tl.load(half_squares_row + cluster, mask=cluster < clusters, other=float("inf"))[None, :]
        tile_best, tile_label = tl.max(scores, 1, return_indices=True)
        label = tl.where(tile_best > best, start + tile_label, label)
        best = tl.maximum(best, tile_best)
    tl.store(labels + (item * heads + head).to(tl.int64) * tokens + token, label.to(tl.int64), mask=valid)


@triton.jit
def cluster_mean_kernel(
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
    """Compute the mean of one cluster, or copy its old centroid if it is empty.

    Args:
        x: ``[B, H, N, D]``.
        order, edges: as in `Clusters`, ``[B, H, N]`` and ``[B, H, C + 1]``.
        old, new: centroids, float32 ``[B, H, C, D]``.
    """
    program = tl.program_id(0).to(tl.int64)
    sequence = program // clusters
    head, item = sequence % heads, sequence // heads
    bounds = edges + sequence * (clusters + 1) + program % clusters
    begin, end = tl.load(bounds), tl.load(bounds + 1)
    sums = ()
    for i in tl.static_range(len(WIDTHS)):
        sums = sums + (tl.zeros([tile_width(WIDTHS, i)], tl.float32),)
    for start in range(begin, end, ROWS):
        position = start + tl.arange(0, ROWS)
        valid = position < end
        token = tl.load(order + sequence * tokens + position, mask=valid, other=0)
        rows = gather_rows(x, x_strides, item, head, token, valid, WIDTHS)
        new_sums = ()
        for i in tl.static_range(len(WIDTHS)):
            new_sums = new_sums + (sums[i] + tl.sum(rows[i].to(tl.float32), 0),)
        sums = new_sums

    is_empty, size = begin == end, tl.maximum(end - begin, 1).to(tl.float32)
    for i in tl.static_range(len(WIDTHS)):
        columns = tile_offset(WIDTHS, i) + tl.arange(0, tile_width(WIDTHS, i))
        columns += program * tile_offset(WIDTHS, len(WIDTHS))
        tl.store(new + columns, tl.where(is_empty, tl.load(old + columns), sums[i] / size))
