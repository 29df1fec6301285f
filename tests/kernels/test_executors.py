"""Every executor against float64 attention for all kinds of plans, and the choice of executors by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from attention_cases import (
    assert_near,
    exact,
    executor_or_skip,
    nan_filled_memory,
    qkv,
    random_order,
    random_plan,
    relative_rms,
    token_mask,
)
from dit_sparse import Grid, Plan, attention, order
from dit_sparse.kernels.executors import EXECUTORS, executor, flex, gather, reference
from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.pick import AUTO, pick

EXACT_EXECUTORS = ["reference", "gather", "cpu"] + ["block_sparse"] * launching.is_interpreted()
for_every_executor = pytest.mark.parametrize("name", EXACT_EXECUTORS)

# arguments of qkv; arguments of random_plan
CASES = {
    "one block": (dict(tokens=9), dict()),
    "whole blocks": (dict(tokens=64), dict()),
    "ragged": (dict(tokens=75), dict()),
    "one token in the last block": (dict(tokens=65), dict(density=0.6)),
    "block 48": (dict(tokens=115), dict(block=48)),
    "own blocks": (dict(tokens=75), dict(density=0.0)),
    "all blocks": (dict(tokens=75), dict(density=1.0)),
    "separate heads": (dict(tokens=75, heads=3), dict(heads=3)),
    "separate items": (dict(tokens=75, batch=2), dict(batch=2)),
    "separate items and heads": (dict(tokens=75, batch=2, heads=3), dict(batch=2, heads=3)),
    "lengths": (dict(tokens=75, batch=2), dict(lengths=[75, 40])),
    "lengths, separate items and heads": (dict(tokens=75, batch=3), dict(batch=3, heads=2, lengths=[1, 64, 65])),
    "order": (dict(tokens=75), dict(order=random_order(tokens=75))),
    "order for each head": (dict(tokens=75, batch=2), dict(heads=2, order=random_order(1, 2, tokens=75))),
    "order for each item": (dict(tokens=75, batch=2), dict(batch=2, order=random_order(2, 1, tokens=75))),
    "order for each item and head": (dict(tokens=75, batch=2), dict(order=random_order(2, 2, tokens=75))),
    "order and lengths": (dict(tokens=75, batch=2), dict(order=random_order(tokens=75, fixed=35), lengths=[40, 75])),
    "grouped heads": (dict(tokens=75, batch=2, heads=6, key_heads=2), dict(heads=6, batch=2)),
    "one key head": (dict(tokens=75, heads=4, key_heads=1), dict(heads=4)),
    "grouped heads, order": (dict(tokens=75, heads=4, key_heads=2), dict(order=random_order(tokens=75))),
    "grouped heads, order for each head": (
        dict(tokens=75, heads=4, key_heads=2),
        dict(order=random_order(1, 4, tokens=75)),
    ),
    "head_dim 32": (dict(tokens=75, dim=32), dict()),
    "head_dim 64": (dict(tokens=75, dim=64), dict()),
    "head_dim 80": (dict(tokens=75, dim=80), dict()),
    "head_dim 96": (dict(tokens=75, dim=96), dict()),
    "head_dim 128": (dict(tokens=75, dim=128), dict()),
}


def case(name: str, **options) -> tuple[list[torch.Tensor], Plan]:
    tensors, plan = CASES[name]
    tensors = {"dim": 16} | tensors | options
    return qkv(**tensors), random_plan(tensors["tokens"], **{"block": 16} | plan)


def low_precision_tolerance(q, k, v, mask, expected) -> float:
    """Return 1.2 times the relative RMS error of SDPA."""
    has_keys = mask.any(-1)
    out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1])
    allowed = 1.2 * relative_rms(out[has_keys], expected[has_keys])
    assert 1e-4 < allowed < 2e-2
    return allowed


def float64_attention(q, k, v, plan, scale=None):
    return exact(q, k, v, token_mask(plan, *q.shape[:2]), scale)


# --- agreement


@for_every_executor
@pytest.mark.parametrize("shape", CASES)
def test_agrees_with_float64(name, shape):
    (q, k, v), plan = case(shape)
    run = executor_or_skip(name, q, k, plan)
    before = [x.clone() for x in (q, k, v)]
    with nan_filled_memory():
        out, lse = run.attend(q, k, v, plan)
    expected, log_sum_exp = float64_attention(q, k, v, plan)
    assert_near(out, expected, 2e-6)
    assert_near(lse, log_sum_exp, 2e-6)
    assert (out.dtype, lse.dtype, lse.shape) == (q.dtype, torch.float32, q.shape[:3])
    assert all(x.equal(y) for x, y in zip(before, (q, k, v), strict=True)), "inputs are unchanged"


@for_every_executor
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", ["ragged", "lengths, separate items and heads", "grouped heads", "head_dim 128"])
def test_low_precision_error_is_close_to_sdpa(name, dtype, shape):
    (q, k, v), plan = case(shape, dtype=dtype)
    run = executor_or_skip(name, q, k, plan)
    with nan_filled_memory():
        out, lse = run.attend(q, k, v, plan)
    mask = token_mask(plan, *q.shape[:2])
    expected, log_sum_exp = exact(q, k, v, mask)
    assert_near(out, expected, low_precision_tolerance(q, k, v, mask, expected))
    assert_near(lse, log_sum_exp, 2e-3)
    assert out.dtype == dtype and lse.dtype == torch.float32


@for_every_executor
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_scale(name, scale):
    (q, k, v), plan = case("ragged")
    out, lse = executor_or_skip(name, q, k, plan).attend(q, k, v, plan, scale)
    expected, log_sum_exp = float64_attention(q, k, v, plan, scale)
    assert_near(out, expected, 5e-6)
    assert_near(lse, log_sum_exp, 5e-6)


@for_every_executor
def test_any_memory_layout(name):
    (q, k, v), plan = case("separate items and heads")
    run = executor_or_skip(name, q, k, plan)
    token_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    strided_rows = [torch.stack([x, x + 1], -1)[..., 0] for x in (q, k, v)]
    contiguous = run.attend(q, k, v, plan)
    for tensors in (token_major, strided_rows):
        assert not tensors[0].is_contiguous()
        for actual, expected in zip(run.attend(*tensors, plan), contiguous, strict=True):
            assert_near(actual, expected, 1e-6)


@for_every_executor
def test_query_without_keys_gets_zero(name):
    """Each block keeps its own block, which is padding from the second block of the second item on."""
    (q, k, v), plan = case("own blocks", batch=2)
    plan = plan.with_lengths(torch.tensor([75, 16]))
    run = executor_or_skip(name, q, k, plan)
    with nan_filled_memory():
        out, lse = run.attend(q, k, v, plan)
    assert (out[1, :, 16:] == 0).all() and lse[1, :, 16:].isneginf().all()
    expected, log_sum_exp = float64_attention(q, k, v, plan)
    assert_near(out, expected, 2e-6)
    assert_near(lse, log_sum_exp, 2e-6)


@for_every_executor
def test_padding_does_not_affect_the_result(name):
    (q, k, v), plan = case("lengths")
    run = executor_or_skip(name, q, k, plan)
    clean = run.attend(q, k, v, plan)
    k[1, :, 40:], v[1, :, 40:] = 1e4, -1e4
    for actual, expected in zip(run.attend(q, k, v, plan), clean, strict=True):
        assert_near(actual, expected, 1e-6)


@for_every_executor
def test_large_scores_do_not_overflow(name):
    (q, k, v), plan = case("ragged")
    out, lse = executor_or_skip(name, q, k, plan).attend(100 * q, 100 * k, v, plan)
    expected, log_sum_exp = float64_attention(100 * q, 100 * k, v, plan)
    assert_near(out, expected, 2e-3)
    assert_near(lse, log_sum_exp, 1e-5)


@given(
    tokens=st.integers(1, 90),
    block=st.sampled_from([1, 7, 16, 32]),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    batch=st.integers(1, 2),
    density=st.floats(0, 1),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_gather_and_reference_agree_on_random_problems(tokens, block, heads, batch, density, seed, data):
    lengths = data.draw(st.none() | st.lists(st.integers(1, tokens), min_size=batch, max_size=batch))
    q, k, v = qkv(tokens, batch=batch, heads=heads[0], key_heads=heads[1], dim=8, seed=seed)
    plan = random_plan(tokens, block, batch=batch, heads=heads[0], density=density, seed=seed, lengths=lengths)
    expected = float64_attention(q, k, v, plan)
    for run in (gather, reference):
        for actual, exact_result in zip(run.attend(q, k, v, plan), expected, strict=True):
            assert_near(actual, exact_result, 1e-5)


# --- invariants


@for_every_executor
def test_dense_plan_equals_sdpa(name):
    q, k, v = qkv(75, batch=2, heads=4, key_heads=2, dim=64)
    plan = Plan.dense(75, 32)
    out, lse = executor_or_skip(name, q, k, plan).attend(q, k, v, plan)
    assert_near(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True), 2e-6)
    assert_near(lse, torch.logsumexp(q @ k.repeat_interleave(2, 1).mT / 8, -1), 2e-6)


@for_every_executor
def test_outputs_over_disjoint_keys_merge_to_dense_attention(name):
    """Requires the natural log-sum-exp."""
    q, k, v = qkv(120, heads=3)
    keep = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    keep[..., 0], keep[..., 1] = True, False
    plans = [Plan.from_mask(half, 120, 16) for half in (keep, ~keep)]
    run = executor_or_skip(name, q, k, plans[0])
    (left, lse_left), (right, lse_right) = (run.attend(q, k, v, plan) for plan in plans)
    lse = torch.logaddexp(lse_left, lse_right)
    merged = left * (lse_left - lse).exp()[..., None] + right * (lse_right - lse).exp()[..., None]
    expected, log_sum_exp = float64_attention(q, k, v, Plan.dense(120, 16))
    assert_near(merged, expected, 2e-6)
    assert_near(lse, log_sum_exp, 2e-6)


@for_every_executor
def test_dense_attention_is_independent_of_the_order(name):
    grid = Grid(5, 7, 3, after=11)
    q, k, v = qkv(grid.tokens)
    plans = [Plan.dense(grid.tokens, 16), random_plan(grid.tokens, 16, density=1.0, order=order.hilbert(grid))]
    run = executor_or_skip(name, q, k, plans[0])
    (out, lse), (reordered_out, reordered_lse) = (run.attend(q, k, v, plan) for plan in plans)
    assert_near(reordered_out, out, 2e-6)
    assert_near(reordered_lse, lse, 2e-6)


class LargestTensor(TorchDispatchMode):
    """Record the number of elements of the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


def test_gather_allocates_no_n_by_n_tensor():
    """The largest tensor holds about SCORES_PER_CHUNK scores."""
    q, k, v = qkv(4096, heads=2, dim=8)
    plan = random_plan(4096, 64, heads=2, density=0.2)
    with LargestTensor() as largest:
        gather.attend(q, k, v, plan)
    assert gather.SCORES_PER_CHUNK / 4 < largest.numel <= gather.SCORES_PER_CHUNK < 4096**2


# --- flex, which compiles and therefore has few cases


FLEX_CASES = {
    "order for each head": (dict(tokens=150, batch=2), dict(batch=2, heads=2, order=random_order(1, 2, tokens=150))),
    "grouped heads, lengths, bf16": (
        dict(tokens=150, batch=2, heads=4, key_heads=2, dtype=torch.bfloat16),
        dict(heads=4, lengths=[150, 70]),
    ),
}


@pytest.mark.parametrize("shape", FLEX_CASES)
def test_flex_agrees_with_float64(shape):
    tensors, plan = FLEX_CASES[shape]
    (q, k, v), plan = qkv(**tensors), random_plan(150, 32, **plan)
    run = executor_or_skip("flex", q, k, plan)
    out, lse = run.attend(q, k, v, plan)
    mask = token_mask(plan, *q.shape[:2])
    expected, log_sum_exp = exact(q, k, v, mask)
    assert out.dtype == q.dtype and (lse is None) == (q.device.type == "cpu")
    assert_near(out, expected, 2e-6 if q.dtype == torch.float32 else low_precision_tolerance(q, k, v, mask, expected))
    if lse is not None:
        assert_near(lse, log_sum_exp, 2e-6 if q.dtype == torch.float32 else 2e-3)


# --- choice by name


@pytest.fixture
def call() -> tuple[torch.Tensor, torch.Tensor, Plan]:
    q, k, _ = qkv(75)
    return q, k, random_plan(75, 16)


def test_every_executor_has_the_documented_interface():
    for name in EXECUTORS:
        module = executor(name)
        assert callable(module.attend) and callable(module.why_not)
        assert isinstance(module.LSE, bool) and isinstance(module.CLUSTERS, bool)
    assert {name for names in AUTO.values() for name in names} <= set(EXECUTORS)


def test_named_executor_runs_or_raises(call, monkeypatch):
    q, k, plan = call
    assert pick("gather", q, k, plan).executor is gather
    long = torch.empty(1).expand(1, 1, 16385, 8)
    with pytest.raises(RuntimeError, match="executor 'reference' cannot run this call: supports at most 16384 tokens"):
        pick("reference", long, long, Plan.dense(16385, 256))
    monkeypatch.setattr(gather, "why_not", lambda *_: "requires something")
    with pytest.raises(RuntimeError, match="executor 'gather' cannot run this call: requires something"):
        pick("gather", q, k, plan)


def test_flex_why_not(call, monkeypatch):
    q, k, plan = call
    assert "has no backward pass on CPUs" in flex.why_not(q.requires_grad_(), k, plan)
    monkeypatch.setattr(flex.shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match=r"requires a C\+\+ compiler"):
        pick("flex", q.detach(), k, plan)


def test_unknown_executor_raises(call):
    for name in ("triton", "", "AUTO"):
        with pytest.raises(ValueError, match=f"executor must be one of auto, reference, gather, .*, got '{name}'"):
            pick(name, *call)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [4, 20, 64, 512])
def test_auto_supports_every_dtype_and_head_dim_on_a_cpu(dtype, dim):
    grid = Grid(2, 5, 5)
    q, k, v = qkv(grid.tokens, dim=dim, dtype=dtype)
    assert pick("auto", q, k, random_plan(grid.tokens, 16)).name in AUTO["cpu"]
    out, lse = attention(q, k, v, grid=grid, block=16)
    assert out.dtype == dtype and out.isfinite().all() and lse.isfinite().all()
