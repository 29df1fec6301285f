"""k-means in Triton and in PyTorch against Lloyd's algorithm in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from attention_cases import assert_near, nan_filled_memory, qkv
from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.planning.cluster import kmeans

pytestmark = pytest.mark.usefixtures("triton_preferred")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_HALF = DEVICE == "cuda"
DTYPE = torch.float16 if IS_HALF else torch.float32


@pytest.fixture(params=["triton", "pytorch"])
def implementation(request, monkeypatch):
    if request.param == "pytorch":
        use_pytorch(monkeypatch)
    return request.param


def use_pytorch(monkeypatch) -> None:
    monkeypatch.setattr(launching, "why_not", lambda *_: "requires something")


def points(tokens: int = 150, dim: int = 64, dtype=DTYPE, **options) -> torch.Tensor:
    return qkv(tokens, dim=dim, dtype=dtype, **options)[0].to(DEVICE)


def lloyd(x: torch.Tensor, centroids: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return labels and centroids of one head, ``x [N, D]``, in float64."""
    x, centroids = x.double(), centroids.double()
    for _ in range(steps):
        labels = torch.cdist(x, centroids).argmin(-1)
        members = [x[labels == c] for c in range(len(centroids))]
        centroids = torch.stack([m.mean(0) if len(m) else c for m, c in zip(members, centroids, strict=True)])
    return labels, centroids


@pytest.mark.parametrize("tokens, dim, clusters", [(150, 64, 7), (37, 64, 37), (130, 80, 66), (5, 128, 1)])
def test_agrees_with_lloyds_algorithm(implementation, tokens, dim, clusters):
    x = points(tokens, dim, batch=2)
    start = x[:, :, torch.randperm(tokens, generator=torch.Generator().manual_seed(1))[:clusters]].float()
    with nan_filled_memory():
        found, means = kmeans(x, clusters, 3, start)
    for item in range(2):
        for head in range(2):
            labels, expected = lloyd(x[item, head].cpu(), start[item, head].to(x.dtype).cpu(), 3)
            agreement = (found.labels[item, head].cpu() == labels).float().mean()
            assert agreement > (0.97 if IS_HALF else 0.999)
            if not IS_HALF:
                assert_near(means[item, head].cpu(), expected, 1e-5)
    assert means.dtype == torch.float32


def test_half_precision(implementation):
    x = points(130, 80, torch.float16)
    start = x[:, :, ::20].float()
    found, means = kmeans(x, start.shape[2], 2, start)
    for head in range(2):
        labels, expected = lloyd(x[0, head].cpu(), start[0, head].cpu(), 2)
        assert (found.labels[0, head].cpu() == labels).float().mean() > 0.97
        assert_near(means[0, head].cpu(), expected, 0.1)


def test_distances_do_not_increase_with_iterations(implementation):
    x = points(200)
    distances = []
    for steps in (1, 2, 4, 8):
        found, means = kmeans(x, 9, steps)
        nearest = means.gather(2, found.labels[..., None].expand(-1, -1, -1, x.shape[-1]))
        distances.append((x.float() - nearest).square().sum().item())
    assert all(later <= sooner * 1.0001 for sooner, later in pairwise(distances)), distances


def test_warm_start_continues_the_iterations(implementation):
    x = points(200)
    _, halfway = kmeans(x, 6, 3)
    resumed, _ = kmeans(x, 6, 2, halfway)
    uninterrupted, _ = kmeans(x, 6, 5)
    assert torch.equal(resumed.labels, uninterrupted.labels)


def test_separated_groups_become_clusters(implementation):
    x = points(120) * 0.01
    groups = torch.arange(120, device=DEVICE) % 4
    x = x + 3 * torch.eye(64, device=DEVICE, dtype=x.dtype)[groups]
    start = x[:, :, :4].float()
    found, _ = kmeans(x, 4, 2, start)
    assert torch.equal(found.labels, groups.expand_as(found.labels))
    assert torch.equal(found.order[0, 0], groups.argsort(stable=True)), "the sort is stable"


def test_empty_cluster_keeps_its_centroid(implementation):
    x = points(50)
    start = x[:, :, :3].float().clone()
    start[:, :, 1] = 1000.0
    found, means = kmeans(x, 3, 2, start)
    assert (found.sizes[..., 1] == 0).all() and torch.equal(means[:, :, 1], start[:, :, 1])


def test_any_memory_layout(implementation):
    x = points(70)
    token_major = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(kmeans(token_major, 5)[1], kmeans(x, 5)[1])


def test_invalid_arguments_raise():
    x = points(10)
    with pytest.raises(ValueError, match=r"clusters must be in \[1, 10\] for 10 tokens, got 11"):
        kmeans(x, 11)
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        kmeans(x, 2, 0)
    with pytest.raises(ValueError, match=r"centroids must have shape \[1, 2, 3, 64\], got \[1, 2, 2, 64\]"):
        kmeans(x, 3, 1, x[:, :, :2].float())


def test_chunks_do_not_change_the_labels(monkeypatch):
    use_pytorch(monkeypatch)
    monkeypatch.setattr(launching, "chunk_elements", lambda x: 64)
    x = points(60)
    in_chunks, _ = kmeans(x, 5)
    monkeypatch.undo()
    assert torch.equal(in_chunks.labels, kmeans(x, 5)[0].labels)
