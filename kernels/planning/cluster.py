"""k-means over the tokens of every head, for semantic permutation: Triton on a GPU, PyTorch elsewhere.

An iteration assigns every token to its nearest centroid, sorts the tokens by cluster, and computes the mean of each
cluster. The sort is the permutation that attention needs. The number of iterations is fixed, so nothing synchronizes
with the GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.clusters import Clusters
from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.gpu.architectures import split_head_dim
from dit_sparse.plan import num_blocks

TOKENS_PER_PROGRAM, CENTROIDS_PER_STEP = 128, 64  # of the kernel that finds the nearest centroids


def kmeans(x: Tensor, clusters: int, iterations: int = 2, centroids: Tensor | None = None) -> tuple[Clusters, Tensor]:
    """Cluster the tokens of each head by Lloyd's algorithm with Euclidean distance.

    Args:
        x: ``[B, H, N, D]``.
        clusters: C, at most N.
        iterations: at least 1. Few suffice if the centroids come from a similar x, such as that of an earlier step.
        centroids: initial centroids, ``[B, H, C, D]``; None: tokens evenly spaced over the sequence.

    Returns:
        The clusters, assigned to the centroids before the last update, and the mean of each cluster, float32
        ``[B, H, C, D]``. A cluster without tokens keeps its centroid.

    Raises:
        ValueError: more clusters than tokens, no iterations, or centroids of another shape.
    """
    batch, heads, tokens, dim = x.shape
    if not 1 <= clusters <= tokens:
        raise ValueError(f"clusters must be in [1, {tokens}] for {tokens} tokens, got {clusters}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if centroids is None:
        centroids = x[:, :, torch.arange(clusters, device=x.device) * tokens // clusters].float()
    if centroids.shape != (batch, heads, clusters, dim):
        raise ValueError(f"centroids must have shape {[batch, heads, clusters, dim]}, got {list(centroids.shape)}")
    use_triton = launching.prefers_triton(x) and launching.why_not(x.detach(), x.detach()) is None
    iterate = _iterate_triton if use_triton else _iterate_torch
    with torch.no_grad():
        x = x if use_triton else x.contiguous()
        for _ in range(iterations):
            # Both terms of the distance use the centroids rounded to x's dtype.
            rounded = centroids.to(x.dtype).contiguous()
            half_squares = rounded.float().square().sum(-1) / 2
            assignment, centroids = iterate(x, rounded, half_squares, centroids)
        if not use_triton:
            assignment = Clusters.from_labels(assignment, clusters)
    return assignment, centroids


def _iterate_torch(x: Tensor, centroids: Tensor, half_squares: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """Return the label of every token and the new centroids."""
    labels = _nearest_centroids_torch(x, centroids, half_squares)
    return labels, _cluster_means_torch(x, labels, old)


def _nearest_centroids_torch(x: Tensor, centroids: Tensor, half_squares: Tensor) -> Tensor:
    """Return the nearest centroid of every token, int64 ``[B, H, N]``: the maximum of ``x.c - |c|^2 / 2``."""
    chunk = max(1, launching.chunk_elements(x) // half_squares.numel())
    subtrahend, columns = half_squares.flatten(0, 1)[:, None], centroids.float().mT.flatten(0, 1)
    parts = (torch.baddbmm(subtrahend, part.float(), columns, beta=-1) for part in x.flatten(0, 1).split(chunk, 1))
    return torch.cat([scores.argmax(-1) for scores in parts], -1).unflatten(0, x.shape[:2])


def _cluster_means_torch(x: Tensor, labels: Tensor, old: Tensor) -> Tensor:
    labels = labels.flatten(0, 1)
    row = (labels + torch.arange(len(labels), device=x.device)[:, None] * old.shape[2]).flatten()
    sums = torch.zeros_like(old).flatten(0, 2).index_add_(0, row, x.float().flatten(0, 2)).view_as(old)
    sizes = torch.bincount(row, minlength=old[..., 0].numel()).view_as(old[..., :1])
    return torch.where(sizes > 0, sums / sizes.clamp(min=1), old)


def _iterate_triton(x: Tensor, centroids: Tensor, half_squares: Tensor, old: Tensor) -> tuple[Clusters, Tensor]:
    """Return the clusters and the new centroids. The kernel of the means reads sorted tokens."""
    from dit_sparse.kernels.gpu.cluster import cluster_mean_kernel, nearest_centroid_kernel

    batch, heads, tokens, _ = x.shape
    arguments, labels = nearest_centroid_arguments(x, centroids, half_squares)
    with torch.cuda.device_of(x):
        nearest_centroid_kernel[(batch * heads * num_blocks(tokens, TOKENS_PER_PROGRAM),)](**arguments)
    clusters = Clusters.from_labels(labels, old.shape[2])
    arguments, new = cluster_mean_arguments(x, clusters, old)
    with torch.cuda.device_of(x):
        cluster_mean_kernel[(batch * heads * old.shape[2],)](**arguments)
    return clusters, new


def nearest_centroid_arguments(x: Tensor, centroids: Tensor, half_squares: Tensor) -> tuple[dict, Tensor]:
    """Return the arguments of the kernel, and its output: the label of every token."""
    batch, heads, tokens, dim = x.shape
    (x,) = launching.with_contiguous_rows(x)
    labels = torch.empty(batch, heads, tokens, dtype=torch.int64, device=x.device)
    arguments = dict(
        x=x,
        centroids=centroids,
        half_squares=half_squares,
        labels=labels,
        x_strides=x.stride()[:3],
        centroids_strides=centroids.stride()[:3],
        heads=heads,
        tokens=tokens,
        clusters=centroids.shape[2],
        ROWS=TOKENS_PER_PROGRAM,
        CENTROIDS=CENTROIDS_PER_STEP,
        WIDTHS=split_head_dim(dim, dim),
        num_warps=8,
        num_stages=3 if dim <= 128 else 1,
    )
    return arguments, labels


def cluster_mean_arguments(x: Tensor, clusters: Clusters, old: Tensor) -> tuple[dict, Tensor]:
    """Return the arguments of the kernel, and its output: the new centroids."""
    (x,), dim = launching.with_contiguous_rows(x), x.shape[-1]
    new = torch.empty_like(old, memory_format=torch.contiguous_format)
    arguments = dict(
        x=x,
        order=clusters.order,
        edges=clusters.edges,
        old=old.contiguous(),
        new=new,
        x_strides=x.stride()[:3],
        heads=x.shape[1],
        tokens=x.shape[2],
        clusters=old.shape[2],
        ROWS=32,
        WIDTHS=split_head_dim(dim, dim),
        num_warps=4,
        num_stages=1,
    )
    return arguments, new
