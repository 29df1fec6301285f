"""k-means over the tokens of every head at once, for semantic permutation: Triton on a GPU, plain PyTorch elsewhere.

A step assigns every token to the centroid nearest to it, sorts the tokens by cluster, and takes the mean of each. The
sort is the permutation that attention needs, and nothing waits for the device: the number of steps is fixed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.clusters import Clusters
from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.gpu.architectures import widths

ROWS, GROUP = 128, 64  # tokens and centroids of one tile


def kmeans(x: Tensor, clusters: int, iterations: int = 2, centroids: Tensor | None = None) -> tuple[Clusters, Tensor]:
    """Lloyd's algorithm with Euclidean distance.

    Args:
        x: ``[B, H, N, D]``.
        clusters: C, at most N.
        iterations: steps, at least one. Few do when the centroids come from an earlier, similar x.
        centroids: where to start, ``[B, H, C, D]``; None: tokens evenly spaced over the sequence.

    Returns:
        The clusters, each token's being the nearest of the last step but one, and the mean of each, float32
        ``[B, H, C, D]``. A cluster that loses all its tokens keeps its centroid.

    Raises:
        ValueError: more clusters than tokens, no iterations, or centroids of another shape.
    """
    batch, heads, tokens, dim = x.shape
    if not 1 <= clusters <= tokens:
        raise ValueError(f"{tokens} tokens make 1 to {tokens} clusters, not {clusters}")
    if iterations < 1:
        raise ValueError(f"k-means takes at least one iteration, not {iterations}")
    if centroids is None:
        centroids = x[:, :, torch.arange(clusters, device=x.device) * tokens // clusters].float()
    if centroids.shape != (batch, heads, clusters, dim):
        raise ValueError(f"centroids must be {[batch, heads, clusters, dim]}, not {list(centroids.shape)}")
    by_triton = launching.preferred(x) and launching.why_not(x.detach(), x.detach()) is None
    step = _step_by_triton if by_triton else _step
    with torch.no_grad():
        x = x if by_triton else x.contiguous()
        for left in reversed(range(iterations)):
            # The distances are those to the centroids as rounded to x's type: both terms have to agree.
            rounded = centroids.to(x.dtype).contiguous()
            found, centroids = step(x, rounded, rounded.float().square().sum(-1) / 2, centroids, last=left == 0)
    return found, centroids


def _step(
    x: Tensor, centroids: Tensor, half_squares: Tensor, old: Tensor, last: bool
) -> tuple[Clusters | None, Tensor]:
    """The means of the tokens nearest to each centroid; sorted into clusters are they only in the last step."""
    labels = _assign(x, centroids, half_squares)
    return Clusters.from_labels(labels, old.shape[2]) if last else None, _means(x, labels, old)


def _assign(x: Tensor, centroids: Tensor, half_squares: Tensor) -> Tensor:
    """The nearest centroid of every token, int64 ``[B, H, N]``: the largest ``x.c - |c|^2 / 2``."""
    chunk = max(1, launching.scores_at_once(x) // half_squares.numel())
    less, columns = half_squares.flatten(0, 1)[:, None], centroids.float().mT.flatten(0, 1)
    parts = (torch.baddbmm(less, part.float(), columns, beta=-1) for part in x.flatten(0, 1).split(chunk, 1))
    return torch.cat([scores.argmax(-1) for scores in parts], -1).unflatten(0, x.shape[:2])


def _means(x: Tensor, labels: Tensor, old: Tensor) -> Tensor:
    labels = labels.flatten(0, 1)
    place = (labels + torch.arange(len(labels), device=x.device)[:, None] * old.shape[2]).flatten()
    sums = torch.zeros_like(old).flatten(0, 2).index_add_(0, place, x.float().flatten(0, 2)).view_as(old)
    sizes = torch.bincount(place, minlength=old[..., 0].numel()).view_as(old[..., :1])
    return torch.where(sizes > 0, sums / sizes.clamp(min=1), old)


def _step_by_triton(
    x: Tensor, centroids: Tensor, half_squares: Tensor, old: Tensor, last: bool
) -> tuple[Clusters, Tensor]:
    found = Clusters.from_labels(
        _assign_by_triton(x, centroids, half_squares), old.shape[2]
    )  # a sum runs over sorted tokens
    return found, _means_by_triton(x, found, old)


def _assign_by_triton(x: Tensor, centroids: Tensor, half_squares: Tensor) -> Tensor:
    from dit_sparse.kernels.gpu.cluster import assign

    arguments, labels = launch_assign(x, centroids, half_squares)
    with torch.cuda.device_of(x):
        assign[(x.shape[0] * x.shape[1] * -(-x.shape[2] // ROWS),)](**arguments)
    return labels


def _means_by_triton(x: Tensor, found: Clusters, old: Tensor) -> Tensor:
    from dit_sparse.kernels.gpu.cluster import means

    arguments, new = launch_means(x, found, old)
    with torch.cuda.device_of(x):
        means[(old.shape[0] * old.shape[1] * old.shape[2],)](**arguments)
    return new


def launch_assign(x: Tensor, centroids: Tensor, half_squares: Tensor) -> tuple[dict, Tensor]:
    """The arguments of the kernel, and the labels that it will fill in."""
    batch, heads, tokens, dim = x.shape
    (x,) = launching.in_rows(x)
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
        ROWS=ROWS,
        GROUP=GROUP,
        WIDTHS=widths(dim, dim),
        num_warps=8,
        num_stages=3 if dim <= 128 else 1,
    )
    return arguments, labels


def launch_means(x: Tensor, found: Clusters, old: Tensor) -> tuple[dict, Tensor]:
    """The arguments of the kernel, and the centroids that it will fill in."""
    (x,), dim = launching.in_rows(x), x.shape[-1]
    new = torch.empty_like(old, memory_format=torch.contiguous_format)
    arguments = dict(
        x=x,
        order=found.order,
        edges=found.edges,
        old=old.contiguous(),
        new=new,
        x_strides=x.stride()[:3],
        heads=x.shape[1],
        tokens=x.shape[2],
        clusters=old.shape[2],
        ROWS=32,
        WIDTHS=widths(dim, dim),
        num_warps=4,
        num_stages=1,
    )
    return arguments, new
