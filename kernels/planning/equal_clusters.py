"""Assignment of tokens to clusters of equal size, without synchronization: a fixed number of rounds of offers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.kernels.gpu import launching
from dit_sparse.order import reorder


def assign_equally(x: Tensor, centroids: Tensor, size: int, rounds: int = 6) -> Tensor:
    """Return the cluster of every token, such that all clusters but the last one have ``size`` tokens.

    In each round tokens without a cluster ask for the nearest centroid that has free places, which accepts the most
    similar ones. In round r these are the first N / 2^r tokens without a cluster, because a number that depends on the
    data would synchronize with the GPU. Tokens that are left fill the last places, in the order of both.

    Args:
        x: tokens of length 1, ``[B, H, N, D]``.
        centroids: ``[B, H, C, D]``, also of length 1.
        size: tokens in a cluster, with ``(C - 1) * size < N <= C * size``.
        rounds: number of rounds, from 0 on.

    Returns:
        int64 ``[B, H, N]``.

    Raises:
        ValueError: the tokens do not fit the clusters.
    """
    tokens, clusters = x.shape[2], centroids.shape[2]
    if not (clusters - 1) * size < tokens <= clusters * size:
        raise ValueError(f"{tokens} tokens do not fill {clusters} clusters of {size}, the last one possibly in part")
    free = (tokens - torch.arange(clusters, device=x.device) * size).clamp(max=size).expand(*x.shape[:2], -1)
    labels = torch.full((*x.shape[:2], tokens + 1), clusters, device=x.device)  # clusters: none yet
    labels[..., tokens] = 0  # stands for no token
    for number in range(rounds):
        asking = _first_true(labels == clusters, -(-tokens >> number)) if number else None
        own = labels[..., :tokens] if asking is None else labels.gather(-1, asking)
        asking_x = x if asking is None else reorder(x, asking.clamp(max=tokens - 1))
        similarity, wish = _nearest_free(asking_x, centroids, free)
        wish = torch.where(own == clusters, wish, clusters)
        accepted = _accepted(wish, similarity, free)
        own = torch.where(accepted, wish, own)
        labels = F.pad(own, (0, 1)) if asking is None else labels.scatter(-1, asking, own)
        free = free - _count(torch.where(accepted, wish, clusters), clusters)
    waiting = labels[..., :tokens] == clusters
    number = waiting.cumsum(-1) - 1  # of each waiting token among them
    place = torch.searchsorted(free.cumsum(-1), number.clamp(min=0), right=True).clamp(max=clusters - 1)
    return torch.where(waiting, place, labels[..., :tokens])


def _first_true(mask: Tensor, count: int) -> Tensor:
    """Return the positions of the first ``count`` true values of ``mask [B, H, N + 1]``, N where there are fewer."""
    numbers = torch.arange(1, count + 1, device=mask.device).expand(*mask.shape[:2], -1).contiguous()
    return torch.searchsorted(mask.cumsum(-1), numbers).clamp(max=mask.shape[-1] - 1)


def _nearest_free(x: Tensor, centroids: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Return the similarity and number of the nearest centroid with free places of each token, ``[B, H, N]``."""
    chunk = max(1, launching.chunk_elements(x) // free.numel())
    columns, closed = centroids.float().mT.flatten(0, 1), torch.where(free > 0, 0.0, -torch.inf).flatten(0, 1)[:, None]
    parts = [torch.baddbmm(closed, part.float(), columns).max(-1) for part in x.flatten(0, 1).split(chunk, 1)]
    similarity, number = (torch.cat(part, 1).unflatten(0, x.shape[:2]) for part in zip(*parts, strict=True))
    return similarity, number


def _accepted(wish: Tensor, similarity: Tensor, free: Tensor) -> Tensor:
    """Return which tokens are among the most similar ones that ask for a cluster, up to its free places; bool
    ``[B, H, N]``. A wish of C asks for none."""
    key = wish * 4 - similarity.clamp(-1, 1)  # the tokens of a cluster stay together
    order = key.argsort(dim=-1, stable=True)
    wish = wish.gather(-1, order)
    numbers = torch.arange(free.shape[-1] + 1, device=wish.device).expand(*wish.shape[:2], -1).contiguous()
    first = torch.searchsorted(wish, numbers)
    position = torch.arange(wish.shape[-1], device=wish.device) - first.gather(-1, wish)
    accepted = position < F.pad(free, (0, 1)).gather(-1, wish)
    return torch.empty_like(accepted).scatter_(-1, order, accepted)


def _count(labels: Tensor, clusters: int) -> Tensor:
    """Return the tokens of each cluster, int64 ``[B, H, C]``; labels of C are not counted."""
    counts = torch.zeros(*labels.shape[:2], clusters + 1, dtype=torch.long, device=labels.device)
    return counts.scatter_add_(-1, labels, torch.ones_like(labels))[..., :clusters]
