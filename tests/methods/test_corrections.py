"""Methods that change the attention output: Re-ttention, pooled residuals, Sol."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from attention_cases import (
    assert_near,
    exact,
    qkv,
)
from dit_sparse import ClusterPlan, Grid, Plan, Site, attention, enable
from dit_sparse.kernels import free_memory
from dit_sparse.kernels.executors import flex, reference
from dit_sparse.kernels.tail import merge_attention
from dit_sparse.method import AttentionOutput
from dit_sparse.methods import method
from dit_sparse.methods.corrections.rettention import Rettention
from tiny_pipelines import ALL

GRID = Grid(5, 7, 3, after=11)  # 116 tokens
BLOCK = 16

dense = F.scaled_dot_product_attention


def log_sum_exp(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(q @ k.mT * q.shape[-1] ** -0.5, -1)


def sparse_result(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan | ClusterPlan) -> AttentionOutput:
    compute_dense = partial(reference.attend, q, k, v, plan.full())
    return AttentionOutput(q, k, v, plan, None, *reference.attend(q, k, v, plan), compute_dense)


def test_a_correction_needs_an_executor_with_a_log_sum_exp(monkeypatch):
    monkeypatch.setattr(flex, "LSE", False)  # as on a CPU
    q, k, v = qkv(GRID.tokens)
    with pytest.raises(RuntimeError, match="log-sum-exp"):
        attention(q, k, v, grid=GRID, method="pooled", executor="flex", block=BLOCK)


# --- Re-ttention


def run_steps(method: Rettention, inputs: dict[int, list]) -> list:
    """Return for each step the result of the executor and the corrected output and log-sum-exp."""
    memory, results = {}, []
    for step, (q, k, v) in inputs.items():
        site = Site(GRID, BLOCK, step=step)
        result = sparse_result(q, k, v, method.plan(q, k, k, site, memory))
        results.append((result, *method.correct(result, site, memory)))
    return results


@pytest.mark.parametrize("inner", ["window", "svg2", "adaspa"])
@pytest.mark.parametrize("offload", [False, True])
def test_rettention_is_dense_while_nothing_changes(inner, offload):
    q, k, v = qkv(GRID.tokens, batch=2)
    what = Rettention(inner=method(inner, density=0.2), ramp=0.0, offload=offload)
    for _, out, lse in run_steps(what, dict.fromkeys((3, 4, 5), (q, k, v))):
        assert_near(out, dense(q, k, v), 1e-5)
        assert_near(lse, log_sum_exp(q, k), 1e-5)


def test_rettention_follows_the_formula_between_refreshes():
    what, first, other = Rettention(density=0.2, refresh_interval=4, ramp=0.3), qkv(116), qkv(116, seed=1)
    (refresh, *_), *between, (_, last, _) = run_steps(what, {3: first} | dict.fromkeys((4, 5, 6, 7), other))
    full, full_lse = reference.attend(*first, refresh.plan.full())
    ratio = (refresh.lse - full_lse).exp()[..., None]
    residual = full - ratio * refresh.out
    for number, (result, out, _) in enumerate(between):
        assert_near(out, (ratio + 0.3 * number).clamp(max=1) * result.out + residual, 1e-5)
    assert_near(last, dense(*other), 1e-5)  # step 7 is a refresh


def test_rettention_checks_the_free_memory(monkeypatch, caplog):
    (q, _, _), site = qkv(GRID.tokens), Site(GRID, layers=4)
    need = 4 * 2 * 116 * (32 * 4 + 4)
    free = lambda amount: monkeypatch.setattr(free_memory, "_free_bytes", lambda device: amount)
    with caplog.at_level("INFO", "dit_sparse"):
        Rettention().begin_generation(q, site)
    assert "4 layers" in caplog.text
    free(need)
    assert Rettention().begin_generation(q, site) == need
    free(need - 1)
    with pytest.raises(RuntimeError, match="offload=True"):
        Rettention().begin_generation(q, site)
    free(2 * need - 1)
    assert Rettention().begin_generation(q, site) == need
    with pytest.raises(RuntimeError, match="for other branches"):
        Rettention().begin_generation(q, site, reserved_bytes=need)


def test_rettention_checks_the_memory_before_the_dense_steps(monkeypatch):
    monkeypatch.setattr(free_memory, "_free_bytes", lambda device: 0)
    tiny, calls = ALL["wan"](), []
    with enable(tiny.pipe, "rettention", density=0.3, dense_steps=1, min_tokens=0, block=16):
        tiny.pipe.transformer.blocks[0].register_forward_hook(lambda *_: calls.append(1))
        with pytest.raises(RuntimeError, match="are free"):
            tiny.pipe(**tiny.kwargs())
    assert not calls


def test_a_run_counts_the_dense_pairs_of_refreshes():
    tiny, settings = ALL["wan"](), dict(density=0.3, dense_steps=0, min_tokens=0, block=16)
    with enable(tiny.pipe, "rettention", refresh_interval=100, **settings) as run:
        tiny.pipe(**tiny.kwargs())
        with_refresh = run.report().density_achieved
    with enable(tiny.pipe, "window", **settings) as run:
        tiny.pipe(**tiny.kwargs())
        window, calls = run.report().density_achieved, run.report().sparse_calls
    steps = calls / (2 * tiny.calls)
    assert with_refresh == pytest.approx(window + 1 / steps)


# --- pooled residuals


@given(st.integers(0, 1000), st.floats(0.0, 1.0))
def test_attention_over_two_sets_of_keys_merges_to_dense(seed, density):
    q, k, v = qkv(40, seed=seed)
    mask = torch.rand(1, 2, 40, 40, generator=torch.Generator().manual_seed(seed)) < density
    out, lse = merge_attention(*exact(q, k, v, mask), *exact(q, k, v, ~mask))
    assert_near(out, dense(q, k, v), 1e-5)
    assert_near(lse, log_sum_exp(q, k), 1e-5)


def test_pooled_is_dense_if_the_keys_of_a_group_are_equal():
    q, k, v = qkv(96)
    k = k.unflatten(2, (-1, 16)).mean(3).repeat_interleave(16, 2)
    out, lse = attention(q, k, v, grid=Grid(4, 4, 6), method="pooled", density=0.2, block=16)
    assert_near(out, dense(q, k, v), 1e-5)
    assert_near(lse, log_sum_exp(q, k), 1e-5)


def test_sol_equals_pooled_if_the_queries_of_a_block_are_equal():
    q, k, v = qkv(90)
    q = F.pad(q, (0, 0, 0, 6)).unflatten(2, (-1, 16))[:, :, :, :1].expand(-1, -1, -1, 16, -1).flatten(2, 3)[:, :, :90]
    sol, site = method("sol", density=0.5), Site(Grid(3, 5, 6), 16)
    for lengths in (None, torch.tensor([85])):
        result = sparse_result(q, k, v, sol.plan(q, k, k, site, {}).with_lengths(lengths))
        pooled = reference.attend(q, k, v, result.plan.with_tail(16))
        for actual, expected in zip(sol.correct(result, site, {}), pooled, strict=True):
            assert_near(actual, expected, 1e-5)
