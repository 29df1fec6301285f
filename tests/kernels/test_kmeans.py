"""k-means: the laws of Lloyd's algorithm, for both ways of computing it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from attention_cases import assert_near, poisoned, qkv
from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.planning.cluster import kmeans

pytestmark = pytest.mark.usefixtures("triton_preferred")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDED = DEVICE == "cuda"
KIND = torch.float16 if ROUNDED else torch.float32


@pytest.fixture(params=["triton", "pytorch"])
def way(request, monkeypatch):
    if request.param == "pytorch":
        monkeypatch.setattr(launching, "why_not", lambda *_: "the moon is full")
    return request.param


def points(tokens: int = 150, dim: int = 64, dtype=KIND, **more) -> torch.Tensor:
    return qkv(tokens, dim=dim, dtype=dtype, **more)[0].to(DEVICE)


def lloyd(x: torch.Tensor, centroids: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One head, ``x [N, D]``, as in a textbook, in float64."""
    x, centroids = x.double(), centroids.double()
    for _ in range(steps):
        labels = torch.cdist(x, centroids).argmin(-1)
        members = [x[labels == c] for c in range(len(centroids))]
        centroids = torch.stack([m.mean(0) if len(m) else c for m, c in zip(members, centroids, strict=True)])
    return labels, centroids


@pytest.mark.parametrize("tokens, dim, clusters", [(150, 64, 7), (37, 64, 37), (130, 80, 66), (5, 128, 1)])
def test_is_the_textbook_algorithm(way, tokens, dim, clusters):
    x = points(tokens, dim, batch=2)
    start = x[:, :, torch.randperm(tokens, generator=torch.Generator().manual_seed(1))[:clusters]].float()
    with poisoned():
        found, means = kmeans(x, clusters, 3, start)
    for item in range(2):
        for head in range(2):
            labels, expected = lloyd(x[item, head].cpu(), start[item, head].to(x.dtype).cpu(), 3)
            alike = (found.labels[item, head].cpu() == labels).float().mean()
            assert alike > (0.97 if ROUNDED else 0.999)
            if not ROUNDED:
                assert_near(means[item, head].cpu(), expected, 1e-5)
    assert means.dtype == torch.float32


def test_in_half_precision(way):
    x = points(130, 80, torch.float16)
    start = x[:, :, ::20].float()
    found, means = kmeans(x, start.shape[2], 2, start)
    for head in range(2):
        labels, expected = lloyd(x[0, head].cpu(), start[0, head].cpu(), 2)
        assert (found.labels[0, head].cpu() == labels).float().mean() > 0.97
        assert_near(means[0, head].cpu(), expected, 0.1)


def test_more_steps_never_make_it_worse(way):
    x = points(200)
    spread = []
    for steps in (1, 2, 4, 8):
        found, means = kmeans(x, 9, steps)
        mine = means.gather(2, found.labels[..., None].expand(-1, -1, -1, x.shape[-1]))
        spread.append((x.float() - mine).square().sum().item())
    assert all(later <= sooner * 1.0001 for sooner, later in pairwise(spread)), spread


def test_a_warm_start_goes_on_where_the_last_ended(way):
    x = points(200)
    _, halfway = kmeans(x, 6, 3)
    resumed, _ = kmeans(x, 6, 2, halfway)
    at_once, _ = kmeans(x, 6, 5)
    assert torch.equal(resumed.labels, at_once.labels)


def test_far_apart_groups_are_found(way):
    x = points(120) * 0.01
    groups = torch.arange(120, device=DEVICE) % 4
    x = x + 3 * torch.eye(64, device=DEVICE, dtype=x.dtype)[groups]
    start = x[:, :, :4].float()
    found, _ = kmeans(x, 4, 2, start)
    assert torch.equal(found.labels, groups.expand_as(found.labels))
    assert torch.equal(found.order[0, 0], groups.argsort(stable=True)), "the sort is stable"


def test_an_empty_cluster_keeps_its_centroid(way):
    x = points(50)
    start = x[:, :, :3].float().clone()
    start[:, :, 1] = 1000.0
    found, means = kmeans(x, 3, 2, start)
    assert (found.sizes[..., 1] == 0).all() and torch.equal(means[:, :, 1], start[:, :, 1])


def test_any_memory_layout(way):
    x = points(70)
    laid = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(kmeans(laid, 5)[1], kmeans(x, 5)[1])


def test_wrong_input_is_named():
    x = points(10)
    with pytest.raises(ValueError, match="10 tokens make 1 to 10 clusters, not 11"):
        kmeans(x, 11)
    with pytest.raises(ValueError, match="at least one iteration, not 0"):
        kmeans(x, 2, 0)
    with pytest.raises(ValueError, match=r"centroids must be \[1, 2, 3, 64\], not \[1, 2, 2, 64\]"):
        kmeans(x, 3, 1, x[:, :, :2].float())


def test_the_table_of_distances_is_never_whole(monkeypatch):
    monkeypatch.setattr(launching, "why_not", lambda *_: "the moon is full")
    monkeypatch.setattr(launching, "scores_at_once", lambda x: 64)
    x = points(60)
    in_chunks, _ = kmeans(x, 5)
    monkeypatch.undo()
    assert torch.equal(in_chunks.labels, kmeans(x, 5)[0].labels)
