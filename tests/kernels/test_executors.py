"""Every executor against float64, on every shape a plan can have."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from attention_cases import assert_near, exact, executor_or_skip, poisoned, qkv, random_plan, relative_rms, token_mask
from dit_sparse import Grid, Plan, attention, order
from dit_sparse.kernels.executors import EXECUTORS, executor, flex, gather, reference
from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.pick import AUTO, pick

EAGER = ["reference", "gather", "cpu"] + ["block_sparse"] * launching.interpreted()
every_executor = pytest.mark.parametrize("name", EAGER)


def shuffled(*lead: int, tokens: int = 75) -> torch.Tensor:
    return torch.rand(*lead, tokens, generator=torch.Generator().manual_seed(3)).argsort(-1)


def shuffled_head(tokens: int = 75, fixed: int = 35) -> torch.Tensor:
    """An order whose tail, where padding lies, stays."""
    return torch.cat([shuffled(tokens=tokens - fixed), torch.arange(tokens - fixed, tokens)])


# shape of q, k, v; shape of the plan
CASES = {
    "one block": (dict(tokens=9), dict()),
    "whole blocks": (dict(tokens=64), dict()),
    "ragged": (dict(tokens=75), dict()),
    "one token in the last block": (dict(tokens=65), dict(density=0.6)),
    "block 48": (dict(tokens=115), dict(block=48)),
    "own block only": (dict(tokens=75), dict(density=0.0)),
    "every block": (dict(tokens=75), dict(density=1.0)),
    "heads apart": (dict(tokens=75, heads=3), dict(heads=3)),
    "items apart": (dict(tokens=75, batch=2), dict(batch=2)),
    "items and heads apart": (dict(tokens=75, batch=2, heads=3), dict(batch=2, heads=3)),
    "lengths": (dict(tokens=75, batch=2), dict(lengths=[75, 40])),
    "lengths, all apart": (dict(tokens=75, batch=3), dict(batch=3, heads=2, lengths=[1, 64, 65])),
    "order": (dict(tokens=75), dict(order=shuffled())),
    "order for each head": (dict(tokens=75, batch=2), dict(heads=2, order=shuffled(1, 2))),
    "order for each item": (dict(tokens=75, batch=2), dict(batch=2, order=shuffled(2, 1))),
    "order for each item and head": (dict(tokens=75, batch=2), dict(order=shuffled(2, 2))),
    "order and lengths": (dict(tokens=75, batch=2), dict(order=shuffled_head(), lengths=[40, 75])),
    "grouped heads": (dict(tokens=75, batch=2, heads=6, key_heads=2), dict(heads=6, batch=2)),
    "one key head": (dict(tokens=75, heads=4, key_heads=1), dict(heads=4)),
    "grouped heads, order": (dict(tokens=75, heads=4, key_heads=2), dict(order=shuffled())),
    "grouped heads, order for each head": (dict(tokens=75, heads=4, key_heads=2), dict(order=shuffled(1, 4))),
    "head_dim 32": (dict(tokens=75, dim=32), dict()),
    "head_dim 64": (dict(tokens=75, dim=64), dict()),
    "head_dim 80": (dict(tokens=75, dim=80), dict()),
    "head_dim 96": (dict(tokens=75, dim=96), dict()),
    "head_dim 128": (dict(tokens=75, dim=128), dict()),
}


def case(name: str, **more) -> tuple[list[torch.Tensor], Plan]:
    tensors, plan = CASES[name]
    tensors = {"dim": 16} | tensors | more
    return qkv(**tensors), random_plan(tensors["tokens"], **{"block": 16} | plan)


def allowed_in(q, k, v, mask, expected) -> float:
    """What low precision may cost: a fifth more than it costs PyTorch's own attention."""
    some = mask.any(-1)
    theirs = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1])
    allowed = 1.2 * relative_rms(theirs[some], expected[some])
    assert 1e-4 < allowed < 2e-2
    return allowed


def truth(q, k, v, plan, scale=None):
    return exact(q, k, v, token_mask(plan, *q.shape[:2]), scale)


# --- agreement


@every_executor
@pytest.mark.parametrize("shape", CASES)
def test_agrees_with_float64(name, shape):
    (q, k, v), plan = case(shape)
    run = executor_or_skip(name, q, k, plan)
    before = [x.clone() for x in (q, k, v)]
    with poisoned():
        out, lse = run.attend(q, k, v, plan)
    expected, log_sum_exp = truth(q, k, v, plan)
    assert_near(out, expected, 2e-6)
    assert_near(lse, log_sum_exp, 2e-6)
    assert (out.dtype, lse.dtype, lse.shape) == (q.dtype, torch.float32, q.shape[:3])
    assert all(x.equal(y) for x, y in zip(before, (q, k, v), strict=True)), "inputs are only read"


@every_executor
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", ["ragged", "lengths, all apart", "grouped heads", "head_dim 128"])
def test_low_precision_costs_no_more_than_in_sdpa(name, dtype, shape):
    (q, k, v), plan = case(shape, dtype=dtype)
    run = executor_or_skip(name, q, k, plan)
    with poisoned():
        out, lse = run.attend(q, k, v, plan)
    mask = token_mask(plan, *q.shape[:2])
    expected, log_sum_exp = exact(q, k, v, mask)
    assert_near(out, expected, allowed_in(q, k, v, mask, expected))
    assert_near(lse, log_sum_exp, 2e-3)
    assert out.dtype == dtype and lse.dtype == torch.float32


@every_executor
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_scale_is_the_one_given(name, scale):
    (q, k, v), plan = case("ragged")
    out, lse = executor_or_skip(name, q, k, plan).attend(q, k, v, plan, scale)
    expected, log_sum_exp = truth(q, k, v, plan, scale)
    assert_near(out, expected, 5e-6)
    assert_near(lse, log_sum_exp, 5e-6)


@every_executor
def test_reads_any_memory_layout(name):
    (q, k, v), plan = case("items and heads apart")
    run = executor_or_skip(name, q, k, plan)
    scattered = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    every_other = [torch.stack([x, x + 1], -1)[..., 0] for x in (q, k, v)]
    for tensors in (scattered, every_other):
        assert not tensors[0].is_contiguous()
        for mine, plain in zip(run.attend(*tensors, plan), run.attend(q, k, v, plan), strict=True):
            assert_near(mine, plain, 1e-6)


@every_executor
def test_row_without_a_real_key_is_zero(name):
    """Kept are own blocks only, and those of the second item are padding from the second block on."""
    (q, k, v), plan = case("own block only", batch=2)
    plan = plan.with_lengths(torch.tensor([75, 16]))
    run = executor_or_skip(name, q, k, plan)
    with poisoned():
        out, lse = run.attend(q, k, v, plan)
    assert (out[1, :, 16:] == 0).all() and lse[1, :, 16:].isneginf().all()
    expected, log_sum_exp = truth(q, k, v, plan)
    assert_near(out, expected, 2e-6)
    assert_near(lse, log_sum_exp, 2e-6)


@every_executor
def test_padding_is_never_read_into_the_result(name):
    (q, k, v), plan = case("lengths")
    run = executor_or_skip(name, q, k, plan)
    clean = run.attend(q, k, v, plan)
    k[1, :, 40:], v[1, :, 40:] = 1e4, -1e4
    for mine, plain in zip(run.attend(q, k, v, plan), clean, strict=True):
        assert_near(mine, plain, 1e-6)


@every_executor
def test_large_scores_do_not_overflow(name):
    (q, k, v), plan = case("ragged")
    out, lse = executor_or_skip(name, q, k, plan).attend(100 * q, 100 * k, v, plan)
    expected, log_sum_exp = truth(100 * q, 100 * k, v, plan)
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
def test_gather_and_reference_agree_anywhere(tokens, block, heads, batch, density, seed, data):
    lengths = data.draw(st.none() | st.lists(st.integers(1, tokens), min_size=batch, max_size=batch))
    q, k, v = qkv(tokens, batch=batch, heads=heads[0], key_heads=heads[1], dim=8, seed=seed)
    plan = random_plan(tokens, block, batch=batch, heads=heads[0], density=density, seed=seed, lengths=lengths)
    expected = truth(q, k, v, plan)
    for run in (gather, reference):
        for actual, right in zip(run.attend(q, k, v, plan), expected, strict=True):
            assert_near(actual, right, 1e-5)


# --- laws


@every_executor
def test_full_plan_is_dense_attention(name):
    q, k, v = qkv(150, batch=2, heads=4, key_heads=2, dim=64)
    plan = Plan.dense(150, 32)
    out, lse = executor_or_skip(name, q, k, plan).attend(q, k, v, plan)
    assert_near(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True), 2e-6)
    assert_near(lse, torch.logsumexp(q @ k.repeat_interleave(2, 1).mT / 8, -1), 2e-6)


@every_executor
def test_halves_of_the_keys_merge_to_dense(name):
    """What log-sum-exp is for, and why it has to be the natural one."""
    q, k, v = qkv(120, heads=3)
    keep = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    keep[..., 0], keep[..., 1] = True, False
    plans = [Plan.from_mask(half, 120, 16) for half in (keep, ~keep)]
    run = executor_or_skip(name, q, k, plans[0])
    (left, lse_left), (right, lse_right) = (run.attend(q, k, v, plan) for plan in plans)
    lse = torch.logaddexp(lse_left, lse_right)
    merged = left * (lse_left - lse).exp()[..., None] + right * (lse_right - lse).exp()[..., None]
    expected, log_sum_exp = truth(q, k, v, Plan.dense(120, 16))
    assert_near(merged, expected, 2e-6)
    assert_near(lse, log_sum_exp, 2e-6)


@every_executor
def test_order_of_the_tokens_changes_nothing_when_all_is_kept(name):
    grid = Grid(5, 7, 3, after=11)
    q, k, v = qkv(grid.tokens)
    plans = [Plan.dense(grid.tokens, 16), random_plan(grid.tokens, 16, density=1.0, order=order.hilbert(grid))]
    run = executor_or_skip(name, q, k, plans[0])
    (out, lse), (out_curved, lse_curved) = (run.attend(q, k, v, plan) for plan in plans)
    assert_near(out_curved, out, 2e-6)
    assert_near(lse_curved, lse, 2e-6)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned, in elements."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


def test_gather_writes_no_square():
    """Its largest tensor does not grow with N x N: chunks hold about SCORES_PER_CHUNK scores."""
    q, k, v = qkv(4096, heads=2, dim=8)
    plan = random_plan(4096, 64, heads=2, density=0.2)
    with Largest() as largest:
        gather.attend(q, k, v, plan)
    assert gather.SCORES_PER_CHUNK / 4 < largest.numel <= gather.SCORES_PER_CHUNK < 4096**2


# --- flex: compiled, so few shapes


FLEX = {
    "order for each head": (dict(tokens=150, batch=2), dict(batch=2, heads=2, order=shuffled(1, 2, tokens=150))),
    "grouped heads, lengths, bf16": (
        dict(tokens=150, batch=2, heads=4, key_heads=2, dtype=torch.bfloat16),
        dict(heads=4, lengths=[150, 70]),
    ),
}


@pytest.mark.parametrize("shape", FLEX)
def test_flex_agrees_with_float64(shape):
    tensors, plan = FLEX[shape]
    (q, k, v), plan = qkv(**tensors), random_plan(150, 32, **plan)
    run = executor_or_skip("flex", q, k, plan)
    out, lse = run.attend(q, k, v, plan)
    mask = token_mask(plan, *q.shape[:2])
    expected, log_sum_exp = exact(q, k, v, mask)
    assert out.dtype == q.dtype and (lse is None) == (q.device.type == "cpu")
    assert_near(out, expected, 2e-6 if q.dtype == torch.float32 else allowed_in(q, k, v, mask, expected))
    if lse is not None:
        assert_near(lse, log_sum_exp, 2e-6 if q.dtype == torch.float32 else 2e-3)


# --- pick


@pytest.fixture
def call() -> tuple[torch.Tensor, torch.Tensor, Plan]:
    q, k, _ = qkv(75)
    return q, k, random_plan(75, 16)


def test_every_executor_has_the_same_face():
    for name in EXECUTORS:
        module = executor(name)
        assert callable(module.attend) and callable(module.why_not)
        assert isinstance(module.LSE, bool) and isinstance(module.CLUSTERS, bool)
    assert {name for names in AUTO.values() for name in names} <= set(EXECUTORS)


def test_named_executor_runs_or_says_why_not(call, monkeypatch):
    q, k, plan = call
    assert pick("gather", q, k, plan).executor is gather
    long = torch.empty(1).expand(1, 1, 16385, 8)
    with pytest.raises(RuntimeError, match=r"'reference' cannot run here: it writes the whole 16385 x 16385 mask"):
        pick("reference", long, long, Plan.dense(16385, 256))
    monkeypatch.setattr(gather, "why_not", lambda *_: "the moon is full")
    with pytest.raises(RuntimeError, match="'gather' cannot run here: the moon is full"):
        pick("gather", q, k, plan)


def test_flex_says_what_it_lacks(call, monkeypatch):
    q, k, plan = call
    assert "no backward pass" in flex.why_not(q.requires_grad_(), k, plan)
    monkeypatch.setattr(flex.shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler"):
        pick("flex", q.detach(), k, plan)


def test_unknown_executor_is_named(call):
    for name in ("triton", "", "AUTO"):
        with pytest.raises(ValueError, match=f"no executor '{name}'; there are auto, reference, gather"):
            pick(name, *call)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [4, 20, 64, 512])
def test_auto_always_finds_one_on_a_cpu(dtype, dim):
    grid = Grid(2, 5, 5)
    q, k, v = qkv(grid.tokens, dim=dim, dtype=dtype)
    assert pick("auto", q, k, random_plan(grid.tokens, 16)).name in AUTO["cpu"]
    out, lse = attention(q, k, v, grid=grid, block=16)
    assert out.dtype == dtype and out.isfinite().all() and lse.isfinite().all()
