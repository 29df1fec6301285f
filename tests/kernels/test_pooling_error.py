"""Scores of tiles by what their pooled terms get wrong: every implementation against the formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attention_cases import TOLERANCE, assert_near, qkv
from dit_sparse.kernels import cpu_library
from dit_sparse.kernels.planning import pooling_error as planning
from dit_sparse.kernels.planning.pooling_error import mass_and_spread, pooling_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["torch", "cpu", "triton"])
def implementation(request, monkeypatch) -> str:
    """Compute scores by one implementation; the Triton kernels compute what they support."""
    if request.param == "triton":
        request.getfixturevalue("triton_preferred")
    else:
        monkeypatch.setattr(planning, "_supports_triton", lambda *_: False)
    if request.param == "torch":  # a chunk holds one block
        monkeypatch.setattr(planning, "_uses_cpu_operators", lambda q: False)
        monkeypatch.setattr(planning.launching, "chunk_elements", lambda x: 1)
    elif request.param == "cpu" and DEVICE == "cuda":
        pytest.skip("tensors are on the GPU")
    elif request.param == "cpu" and (reason := cpu_library.why_not("pooling_error")):
        pytest.skip(reason)
    return request.param


def scores(q: Tensor, k: Tensor, rows: int, columns: int, every: int) -> list[Tensor]:
    """Return mass, mass x spread and error, computed on the GPU if there is one."""
    q, k = (x.to(DEVICE) for x in (q, k))
    mass, spread = (mass_and_spread(q, k, rows, columns, spread=one) for one in (False, True))
    return [x.cpu() for x in (mass, spread, pooling_error(q, k, rows, columns, every))]


def naive_scores(q: Tensor, k: Tensor, rows: int, columns: int, sampled: list[list[int]]) -> tuple[Tensor, ...]:
    """Return mass, mass x spread, and the distance of exact weights, tile by tile in float64, for one head."""
    q, k = q.double(), k.double()
    scale, tiles, blocks = q.shape[-1] ** -0.5, k.split(columns), q.split(rows)
    logits = torch.stack([q @ tile.mean(0) * scale + torch.tensor(float(len(tile))).log() for tile in tiles], 1)
    weight = logits.softmax(-1).split(rows)
    exact, lse = (q @ k.T * scale).softmax(-1), (q @ k.T * scale).logsumexp(-1)
    mass, spread, error = torch.zeros(3, len(blocks), len(tiles), dtype=torch.float64)
    for i, block in enumerate(blocks):
        for j, tile in enumerate(tiles):
            variance = (block.square() * tile.var(0, correction=0)).sum(-1) * scale**2
            mass[i, j], spread[i, j] = weight[i][:, j].mean(), (weight[i][:, j] * variance).mean()
            keys = slice(j * columns, j * columns + len(tile))
            pooled = (q @ tile.mean(0) * scale - lse).exp()
            error[i, j] = torch.stack([(exact[r, keys] - pooled[r]).norm() for r in sampled[i]]).mean()
    return mass, spread, error


def check(q: Tensor, k: Tensor, rows: int, columns: int, every: int, tolerance: float) -> None:
    tokens, group = q.shape[2], q.shape[1] // k.shape[1]
    number = [n * every + n * 5 % every for n in range(-(-rows // every))]
    sampled = [[min(i * rows + min(n, rows - 1), tokens - 1) for n in number] for i in range(-(-tokens // rows))]
    mass, spread, error = scores(q, k, rows, columns, every)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            expected = naive_scores(q[b, h], k[b, h // group], rows, columns, sampled)
            for actual, one in zip((mass, spread, error), expected, strict=True):
                assert actual.dtype == torch.float32
                assert_near(actual[b, h], one, tolerance)
    assert mass.sum(-1).allclose(torch.ones(()), atol=10 * tolerance)


SHAPES = [  # tokens, rows, columns, every, arguments of qkv
    (96, 32, 16, 8, dict(batch=2, dim=16)),
    (75, 16, 7, 5, dict(batch=2, dim=24)),
    (40, 64, 64, 64, dict(dim=8)),
    (1300, 64, 16, 8, dict(heads=1, dim=64)),
    (1100, 200, 3, 7, dict(heads=1, dim=16)),
    (150, 16, 16, 16, dict(heads=4, key_heads=2, dim=80)),
]


@pytest.mark.parametrize(("tokens", "rows", "columns", "every", "options"), SHAPES)
def test_scores_are_those_of_the_formulas(implementation, tokens, rows, columns, every, options):
    """Also where blocks and tiles are cut off, for long blocks, several passes over the keys, and grouped heads."""
    q, k, _ = qkv(tokens, **options)
    check(q, k, rows, columns, every, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_and_layouts(implementation, dtype):
    q, k, _ = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(130, batch=2, dim=32, dtype=dtype))
    tolerance = max(2e-5, TOLERANCE.get(dtype, 0) if implementation == "triton" else 0)
    check(q, k, 32, 8, 4, tolerance)
    check(q.mT.contiguous().mT, k.mT.contiguous().mT, 32, 8, 4, tolerance)


def test_large_scores_do_not_overflow(implementation):
    q, k, _ = qkv(700, heads=1, dim=32)
    k = k * torch.linspace(0.1, 4, 700)[:, None]  # the running maximum rises with every pass
    check(8 * q, k, 64, 16, 8, 1e-3)


def test_keys_that_are_alike_need_no_exact_tile(implementation):
    """Equal keys within each tile: their pooled term is exact, so both scores vanish."""
    q, k, _ = qkv(128, dim=16)
    k = k[:, :, ::16].repeat_interleave(16, 2)
    _, spread, error = scores(q, k, 64, 16, 8)
    _, other_spread, other_error = scores(q, k + torch.randn(k.shape), 64, 16, 8)
    assert spread.abs().max() < 1e-5 * other_spread.max() and error.abs().max() < 1e-4 * other_error.max()


def test_an_offset_of_all_keys_changes_no_score(implementation):
    q, k, _ = qkv(150, dim=16)
    offset = torch.randn(16, generator=torch.Generator().manual_seed(1))
    for actual, expected in zip(scores(q, k + offset, 32, 16, 4), scores(q, k, 32, 16, 4), strict=True):
        assert_near(actual, expected, 1e-4)


def test_triton_supports_query_blocks_and_key_tiles_of_powers_of_two(implementation):
    q, k, _ = (x.to(DEVICE) for x in qkv(100, dim=16, dtype=torch.float16))
    supported = [planning._supports_triton(q, k, rows, columns) for rows, columns in ((64, 16), (48, 16), (64, 12))]
    assert supported == [implementation == "triton", False, False]


def test_scores_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(planning, "_supports_triton", lambda *_: False)
    q, k, _ = qkv(700, dim=32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(torch.cat([mass_and_spread(q, k, 64, 16), pooling_error(q, k, 64, 16, 8)]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
