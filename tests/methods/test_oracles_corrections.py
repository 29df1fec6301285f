"""Corrections of the output against short re-implementations of the rules of their papers, one query at a time."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import BLOCK, GRIDS, blocks_of
from torch import Tensor

from attention_cases import assert_near, exact, qkv
from dit_sparse import Cached, Grid, Site, attention
from dit_sparse.kernels.executors import reference
from dit_sparse.method import AttentionOutput
from dit_sparse.methods import method
from dit_sparse.methods.corrections.pooled import Pooled
from dit_sparse.methods.corrections.rettention import Rettention

every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: str(grid).replace(" ", ""))
DIM = 16


def softmax_sum(logits: list[float], values: list[Tensor]) -> tuple[Tensor, float]:
    """Return the weighted values, and the log-sum-exp."""
    logits = torch.tensor(logits, dtype=torch.float64)
    return logits.softmax(0) @ torch.stack(values), float(logits.logsumexp(0))


def check(one, grid: Grid, tail, group: int = BLOCK) -> None:
    """Assert that each query attends to its kept keys and to the logits of ``tail(query, block, members)``, one for
    every ``group`` tokens of a dropped block with the mean of its values."""
    q, k, v = qkv(grid.tokens, heads=1, dim=DIM, seed=2)
    k = k + 0.7  # an offset of all keys changes nothing but the log-sum-exp
    out, lse = attention(q, k, v, grid=grid, method=one, block=BLOCK, executor="reference")
    mask = one.plan(q, k, k, Site(grid, BLOCK), {}).token_mask(torch.arange(grid.tokens))[0, 0]
    q, k, v = (x[0, 0].double() for x in (q, k, v))
    blocks = blocks_of(grid)
    assert not mask.all()
    for n in range(0, grid.tokens, 5):
        kept = mask[n].nonzero().flatten().tolist()
        logits, values = [float(q[n] @ k[m]) / math.sqrt(DIM) for m in kept], [v[m] for m in kept]
        for members in blocks:
            for first in range(0, 0 if mask[n, members[0]] else len(members), group):
                part = members[first : first + group]
                logits.append(tail(q, k, n, blocks, part))
                values.append(v[part].mean(0))
        expected, expected_lse = softmax_sum(logits, values)
        assert_near(out[0, 0, n], expected, 1e-5)
        assert float(lse[0, 0, n]) == pytest.approx(expected_lse, abs=1e-5)


@every_grid
def test_sol(grid):
    """Every dropped block is one key for all queries of a block: the product of the mean query and the mean key,
    centred over all keys, plus the log of its size."""

    def tail(q, k, n, blocks, members):
        query, centre = q[blocks[n // BLOCK]].mean(0), k.mean(0)
        product = query @ (k[members].mean(0) - centre) + q[n] @ centre
        return float(product) / math.sqrt(DIM) + math.log(len(members))

    check(method("sol"), grid, tail)


@every_grid
@pytest.mark.parametrize("group", [None, 16, 5])
def test_pooled(grid, group):
    """Combiner: every dropped block, or each group of its tokens, is one key for each query."""

    def tail(q, k, n, blocks, members):
        return float(q[n] @ k[members].mean(0)) / math.sqrt(DIM) + math.log(len(members))

    check(Pooled(inner=method("radial", density=0.45), group=group), grid, tail, group or BLOCK)


@every_grid
@pytest.mark.parametrize("ramp", [0.0, 0.04, 0.5])
def test_rettention(grid, ramp):
    """A refresh at every third step stores the share of the kept keys and the output of the others."""
    one, memory = Rettention(density=0.45, refresh_interval=3, ramp=ramp), {}
    share, residual = None, None
    for step in range(5):
        q, k, v = qkv(grid.tokens, heads=1, dim=DIM, seed=step)
        site = Site(grid, BLOCK, step=step)
        plan = one.plan(q, k, k, site, memory)
        dense = reference.attend(q, k, v, plan.full())
        result = AttentionOutput(q, k, v, plan, None, *reference.attend(q, k, v, plan), lambda dense=dense: dense)
        out, lse = one.correct(result, site, memory)
        mask = plan.token_mask(torch.arange(grid.tokens))
        sparse, sparse_lse = exact(q, k, v, mask)
        if step % 3 == 0:
            full, full_lse = exact(q, k, v, torch.ones_like(mask))
            share = (sparse_lse - full_lse).exp()
            residual = full - share[..., None] * sparse
            assert_near(out, full, 1e-5)
            assert_near(lse, full_lse, 1e-5)
            continue
        assert_near(out, share[..., None] * sparse + residual, 1e-5)
        assert_near(lse, sparse_lse - share.log(), 1e-5)
        share = (share + ramp).clamp(max=1)


def test_rettention_where_the_share_underflows():
    """A query whose kept keys hold e^-300 of the softmax: float32 has no such number, its logarithm has."""
    grid = Grid(4, 8, 12)
    q, k, v = qkv(grid.tokens, heads=1, dim=DIM)
    one, memory = Rettention(density=0.3, ramp=0.0), {}
    plan = one.plan(q, k, k, Site(grid, BLOCK), memory)
    dropped = ~plan.token_mask(torch.tensor([0]))[0, 0, 0]
    q[0, 0, 0] = 0
    q[0, 0, 0, 0], k[..., 0] = 1, 0.0
    k[0, 0, dropped, 0] = 1200.0
    for step in range(2):
        site = Site(grid, BLOCK, step=step)
        dense = reference.attend(q, k, v, plan.full())
        result = AttentionOutput(q, k, v, plan, None, *reference.attend(q, k, v, plan), lambda dense=dense: dense)
        out, lse = one.correct(result, site, memory)
        assert out.isfinite().all() and lse.isfinite().all()
        assert_near(lse, dense[1], 1e-5)
        assert_near(out, dense[0], 1e-5)


@every_grid
def test_drift_of_cached(grid):
    """TokenSelect's rule with means of blocks: a new plan once 1 - mean cosine similarity exceeded the threshold at the
    previous call."""
    cached, memory = Cached(inner=method("xattention", density=0.5), drift=0.2), {}
    means = lambda q: torch.stack([q[0, 0, block].double().mean(0) for block in blocks_of(grid)])
    last, planned, has_drifted = None, None, True
    made = []
    for step in range(8):
        q, k, _ = qkv(grid.tokens, heads=1, dim=DIM)
        q = q + step * torch.randn(1, 1, 1, DIM, generator=torch.Generator().manual_seed(9)) / 4
        plan = cached.plan(q, k, k, Site(grid, BLOCK, step=step), memory)
        assert (plan is not last) == has_drifted
        made += [step] if has_drifted else []
        planned = q if has_drifted else planned
        has_drifted = float(1 - torch.cosine_similarity(means(q), means(planned), dim=-1).mean()) > 0.2
        last = plan
    assert 1 < len(made) < 8
