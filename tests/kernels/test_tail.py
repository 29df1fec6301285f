"""Pooled tails of plans: every executor against float64, and laws of attention over kept keys and pooled terms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from attention_cases import (
    HALF_DTYPES,
    TOLERANCE,
    assert_near,
    exact_with_tail,
    executor_or_skip,
    nan_filled_memory,
    qkv,
    random_cluster_plan,
    random_clusters,
    random_order,
    random_plan,
    term_labels,
)
from dit_sparse import ClusterPlan, Plan
from dit_sparse.kernels.executors import EXECUTORS, executor, flex, gather, reference
from dit_sparse.kernels.pick import pick
from dit_sparse.kernels.tail import add_tail, attend_tail

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL_DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32
NAMES = ("reference", "gather", "cpu", "block_sparse", "block_ragged")
every_executor = pytest.mark.parametrize("name", NAMES)

BLOCKS = {  # arguments of qkv, of random_plan in blocks of 64, and the tail
    "ragged": (dict(tokens=150), dict(), 16),
    "one token in the last block": (dict(tokens=129), dict(density=0.5), 16),
    "a tail that does not divide a block": (dict(tokens=150), dict(), 24),
    "whole blocks": (dict(tokens=200), dict(density=0.1), 1000),
    "single keys": (dict(tokens=130, heads=1), dict(), 1),
    "many blocks": (dict(tokens=700, heads=1), dict(density=0.1), 4),
    "lengths": (dict(tokens=150, batch=3, heads=1), dict(lengths=[150, 100, 40]), 16),
    "order for each head, lists for each item": (
        dict(tokens=150, batch=2, heads=2),
        dict(batch=2, order=random_order(1, 2, tokens=150)),
        16,
    ),
    "order and lengths": (
        dict(tokens=150, batch=2),
        dict(order=random_order(tokens=150, fixed=50), lengths=[100, 150]),
        16,
    ),
    "grouped heads": (dict(tokens=150, heads=4, key_heads=2), dict(heads=4), 32),
    "grouped heads, order for each head": (
        dict(tokens=150, batch=2, heads=4, key_heads=2),
        dict(heads=4, order=random_order(2, 4, tokens=150)),
        16,
    ),
    "head_dim 80": (dict(tokens=150, dim=80), dict(), 16),
    "head_dim 128": (dict(tokens=150, heads=1, dim=128), dict(), 16),
}
CLUSTERS = {  # arguments of qkv, of random_cluster_plan, and the tail
    "one head": (dict(tokens=300, heads=1), dict(), 16),
    "separate items and heads": (dict(tokens=200, batch=2, heads=2), dict(batch=2, heads=2), 7),
    "whole clusters": (dict(tokens=200), dict(), 1000),
    "more clusters than tokens": (dict(tokens=20), dict(queries=30, keys=40), 4),
    "lengths": (dict(tokens=300, batch=3, heads=1), dict(lengths=[300, 251, 200]), 16),
    "grouped heads, lists and orders per query head": (dict(tokens=200, heads=4, key_heads=2), dict(heads=4), 16),
    "one order, lists per head": (dict(tokens=200, heads=2), dict(heads=1), 16),
}


def case(shape: str, dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], Plan | ClusterPlan]:
    tensors, plan, tail = (BLOCKS | CLUSTERS)[shape]
    q, k, v = qkv(**{"dim": 64} | tensors, dtype=dtype)
    if shape in BLOCKS:
        return [q, k, v], random_plan(tensors["tokens"], 64, **plan).with_tail(tail)
    return [q, k, v], random_cluster_plan(tensors["tokens"], **plan).with_tail(tail)


def check(name: str, q, k, v, plan, scale=None, tolerance=None) -> None:
    expected, log_sum_exp = exact_with_tail(q, k, v, plan, scale)
    q, k, v, plan = (x.to(DEVICE) for x in (q, k, v, plan))
    if reason := module_reason(name, q, k, plan):
        pytest.skip(reason)
    with nan_filled_memory():
        out, lse = executor(name).attend(q, k, v, plan, scale)
    tolerance = TOLERANCE[q.dtype] if tolerance is None else tolerance
    assert (out.dtype, lse.dtype, lse.shape) == (q.dtype, torch.float32, q.shape[:3])
    assert_near(out.cpu(), expected, tolerance)
    assert_near(lse.cpu(), log_sum_exp, tolerance)


def module_reason(name: str, q, k, plan) -> str | None:
    try:
        pick(name, q, k, plan)
    except RuntimeError as error:
        return str(error)
    return None


@every_executor
@pytest.mark.parametrize("shape", [*BLOCKS, *CLUSTERS])
def test_agrees_with_float64(shape, name):
    (q, k, v), plan = case(shape, KERNEL_DTYPE if name.startswith("block") else torch.float32)
    assert 0 < plan.tail_density < 1 and plan.density < 1
    check(name, q, k, v, plan)


@every_executor
@pytest.mark.parametrize("scale", [0.5, 0.0, -0.3])
def test_scale(name, scale):
    (q, k, v), plan = case("ragged", KERNEL_DTYPE if name.startswith("block") else torch.float32)
    check(name, q, k, v, plan, scale, 5e-6 if q.dtype == torch.float32 else 2e-3)


@every_executor
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["lengths", "grouped heads", "separate items and heads"])
def test_half_precision(name, dtype, shape):
    if name.startswith("block") and dtype not in HALF_DTYPES:
        pytest.skip("Triton's interpreter multiplies bfloat16 incorrectly")
    (q, k, v), plan = case(shape, dtype)
    check(name, q, k, v, plan)


@every_executor
@pytest.mark.parametrize("clusters", [False, True])
def test_padding_does_not_affect_the_result(name, clusters):
    (q, k, v), plan = case("order and lengths", KERNEL_DTYPE)
    if clusters:
        (q, k, v), plan = qkv(150, batch=2, dim=64), random_cluster_plan(150, lengths=[150, 100]).with_tail(16)
    q, k, v, plan = (
        x.to(DEVICE, KERNEL_DTYPE) if isinstance(x, torch.Tensor) else x.to(DEVICE) for x in (q, k, v, plan)
    )
    run = executor_or_skip(name, q, k, plan) if module_reason(name, q, k, plan) is None else pytest.skip(name)
    clean, clean_lse = run.attend(q, k, v, plan)
    for item, length in enumerate(plan.lengths.tolist()):
        k[item, :, length:] = 0.0 if name == "reference" else torch.nan  # reference multiplies scores by 0
        v[item, :, length:] = torch.nan
    out, lse = run.attend(q, k, v, plan)
    assert out.equal(clean) and lse.equal(clean_lse)


@every_executor
def test_a_tail_changes_nothing_if_every_group_is_kept(name):
    for shape in ("ragged", "one head"):
        (q, k, v), plan = case(shape, KERNEL_DTYPE)
        q, k, v, plan = (x.to(DEVICE) for x in (q, k, v, plan.full()))
        if module_reason(name, q, k, plan) is None:
            assert plan.tail is None and plan.with_tail(16).tail_density == 0
            for actual, expected in zip(
                executor(name).attend(q, k, v, plan.with_tail(16)), executor(name).attend(q, k, v, plan), strict=True
            ):
                assert_near(actual, expected, 1e-6)


# --- laws


@given(
    tokens=st.integers(1, 90),
    block=st.sampled_from([1, 7, 16, 32]),
    tail=st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    clusters=st.booleans(),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_gather_and_reference_agree_on_random_problems(tokens, block, tail, heads, clusters, seed, data):
    lengths = data.draw(st.none() | st.lists(st.integers(1, tokens), min_size=2, max_size=2))
    q, k, v = qkv(tokens, batch=2, heads=heads[0], key_heads=heads[1], dim=8, seed=seed)
    if clusters:
        sides = (random_clusters(tokens, count, 1, heads[0], seed=seed + count) for count in (3, 5))
        keep = torch.rand(1, heads[0], 3, 5, generator=torch.Generator().manual_seed(seed)) < 0.4
        keep[..., 0] = True
        plan = ClusterPlan.from_mask(keep, *sides)
    else:
        plan = random_plan(tokens, block, heads=heads[0], seed=seed, lengths=lengths)
    plan = plan.with_tail(tail)
    expected = exact_with_tail(q, k, v, plan)
    for run in (gather, reference):
        for actual, exact_result in zip(run.attend(q, k, v, plan), expected, strict=True):
            assert_near(actual, exact_result, 1e-5)


@pytest.mark.parametrize("shape", ["ragged", "lengths", "order for each head, lists for each item", "one head"])
def test_terms_of_one_key_are_exact(shape):
    """A tail of single keys computes all pairs."""
    (q, k, v), plan = case(shape)
    for actual, expected in zip(
        reference.attend(q, k, v, plan.with_tail(1)), reference.attend(q, k, v, plan.full()), strict=True
    ):
        assert_near(actual, expected, 2e-6)


def test_terms_of_equal_keys_are_exact():
    """The mean of n equal keys has the logit of each plus log n, whatever their values."""
    (q, k, v), plan = case("order for each head, lists for each item")
    labels = term_labels(plan, 2, 2)
    member = F.one_hot(labels).float()
    means = member.mT @ k / member.sum(2)[..., None].clamp(min=1)
    k = torch.take_along_dim(means, labels[..., None], 2)
    for actual, expected in zip(reference.attend(q, k, v, plan), reference.attend(q, k, v, plan.full()), strict=True):
        assert_near(actual, expected, 2e-6)


def test_an_offset_of_keys_and_values_passes_through():
    """An offset of all keys shifts every logit of a row alike, so the log-sum-exp alone changes; weights sum to one."""
    (q, k, v), plan = case("ragged")
    out, lse = gather.attend(q, k, v, plan)
    offset = torch.randn(64, generator=torch.Generator().manual_seed(1))
    shifted, shifted_lse = gather.attend(q, k + offset, v - 2 * offset, plan)
    assert_near(shifted, out - 2 * offset, 1e-5)
    assert_near(shifted_lse, lse + (q @ offset) / 8, 1e-5)


def test_keys_of_a_term_are_a_set():
    (q, k, v), plan = case("ragged")
    flip = torch.cat([torch.arange(first, min(first + 16, 150)).flip(0) for first in range(0, 150, 16)])
    for actual, expected in zip(
        attend_tail(q, k[:, :, flip], v[:, :, flip], plan), attend_tail(q, k, v, plan), strict=True
    ):
        assert_near(actual, expected, 2e-6)


def test_a_query_without_keys_or_terms_gets_zero():
    q, k, v = qkv(70, batch=2)
    plan = random_plan(70, 16, lengths=[70, 0], density=0.0).with_tail(4)
    for out, lse in (reference.attend(q, k, v, plan), gather.attend(q, k, v, plan)):
        assert (out[1] == 0).all() and lse[1].isneginf().all() and out[0].abs().min() > 0


# --- plans


@pytest.mark.parametrize("shape", [*BLOCKS, *CLUSTERS])
def test_tail_density_counts_pairs_of_queries_and_terms(shape):
    (q, _, _), plan = case(shape)
    plan = replace(plan, lengths=None)
    batch, heads, tokens, _ = q.shape
    labels = term_labels(plan, batch, heads)
    mask = plan.token_mask(torch.arange(tokens)).expand(batch, heads, -1, -1)
    pairs = 0
    for item, head in torch.cartesian_prod(torch.arange(batch), torch.arange(heads)).tolist():
        dropped = (labels[item, head][row == 0].unique().numel() for row in mask[item, head])
        pairs += sum(dropped)
    assert plan.tail_density == pytest.approx(pairs / (batch * heads * tokens**2))


def test_plans_keep_their_tail():
    (_, _, _), plan = case("separate items and heads")
    for one in (plan.repeat_batch(), plan.to("cpu"), plan.with_lengths(torch.tensor([200, 100]))):
        assert one.tail == 7 and "pooled tail of 7 tokens" in repr(one)
    assert plan.with_tail(None).tail is None and plan.with_tail(None).tail_density == 0
    with pytest.raises(ValueError, match="must hold at least one token, got tail=0"):
        plan.with_tail(0)


def test_plans_by_head_share_a_tail():
    first, second = (random_plan(150, 64, heads=2, seed=seed).with_tail(16) for seed in (0, 1))
    choice = torch.tensor([[0, 1]])
    assert Plan.by_head([first, second], choice).tail == 16
    assert Plan.by_head([first, second.with_tail(None)], choice).tail is None
    assert first.expand_heads(torch.tensor([1, 0]), 3).tail == 16


# --- executors that merge the tail


def test_executors_without_a_log_sum_exp_refuse_a_tail(monkeypatch):
    monkeypatch.setattr(flex, "LSE", False)  # as on a CPU
    (q, k, _), plan = case("ragged")
    with pytest.raises(
        RuntimeError, match="returns no log-sum-exp, which merging the pooled tail of the plan requires"
    ):
        pick("flex", q, k, plan)


def test_add_tail_merges_any_executor():
    (q, k, v), plan = case("lengths")
    kept = gather.attend(q, k, v, plan.with_tail(None))
    for actual, expected in zip(add_tail(*kept, q, k, v, plan), exact_with_tail(q, k, v, plan), strict=True):
        assert_near(actual, expected, 2e-6)


def test_every_executor_with_a_log_sum_exp_computes_a_tail():
    """An executor computes the tail in its kernel, or `with_tail` wraps its attend."""
    for name in EXECUTORS:
        module = executor(name)
        computes = name in ("reference", "cpu", "block_sparse", "block_ragged")
        assert computes or hasattr(module.attend, "__wrapped__"), name
