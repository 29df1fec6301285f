"""The CPU executor against the specification, its refusals and its build."""

from __future__ import annotations

import importlib.util
import multiprocessing
import stat
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from attention_cases import random_cluster_plan
from dit_sparse.kernels.executors import cpu, reference
from dit_sparse.plan import Plan, num_blocks

REFUSAL = cpu.why_not(torch.zeros(1, 1, 16, 64), torch.zeros(1, 1, 16, 64), Plan.dense(16, 16))
needs_build = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def inputs(batch=1, heads=2, tokens=300, dim=64, kv_heads=None, dtype=torch.float32):
    shapes = [(batch, count, tokens, dim) for count in (heads, kv_heads or heads, kv_heads or heads)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def random_plan(tokens, block, batch=1, heads=1, density=0.3, order=None, lengths=None):
    blocks = num_blocks(tokens, block)
    keep = torch.rand(batch, heads, blocks, blocks) < density
    keep[..., 0] |= ~keep.any(-1)
    return Plan.from_mask(keep, tokens, block, order).with_lengths(lengths)


def assert_agrees(q, k, v, plan, scale=None):
    out, lse = cpu.attend(q, k, v, plan, scale)
    expected, expected_lse = reference.attend(q, k, v, plan, scale)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert (out - expected).abs().max() <= 2e-5 * expected.square().mean().sqrt().clamp(min=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=2e-6, atol=5e-6)
    return out, lse


@needs_build
@pytest.mark.parametrize("block", [16, 24, 64, 100, 128, 256])
@pytest.mark.parametrize("tokens", [16, 300, 777])
def test_ragged_sizes(tokens, block):
    assert_agrees(*inputs(tokens=tokens), random_plan(tokens, block, heads=2))


@needs_build
@pytest.mark.parametrize("dim", [8, 32, 64, 72, 80, 96, 128, 256])
def test_head_dims(dim):
    assert_agrees(*inputs(dim=dim), random_plan(300, 64))


@needs_build
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_plans_shared_and_apart(batch, heads):
    assert_agrees(*inputs(batch=2, heads=3), random_plan(300, 32, batch, heads))


@needs_build
def test_passes_of_many_blocks_with_growing_scores():
    """The maximum rises from pass to pass, so that what was accumulated must be rescaled."""
    q, k, v = inputs(tokens=2048, heads=1)
    k = k * torch.linspace(0.1, 4, 2048)[:, None]
    assert_agrees(q, k, v, random_plan(2048, 64, density=0.7))


@needs_build
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("order_shape", [None, (), (1, 1), (2, 1), (1, 4), (2, 4)])
def test_orders_and_grouped_heads(kv_heads, order_shape):
    order = None
    if order_shape is not None:
        order = torch.rand(*order_shape, 300).argsort(-1)
    plan = random_plan(300, 64, heads=4, order=order)
    assert_agrees(*inputs(batch=2, heads=4, kv_heads=kv_heads), plan)


@needs_build
@pytest.mark.parametrize("lengths", [[300, 17], [1, 256], [299, 0]])
def test_lengths(lengths):
    plan = random_plan(300, 64, batch=2, lengths=torch.tensor(lengths))
    out, lse = assert_agrees(*inputs(batch=2), plan)
    unseen = torch.isinf(lse)
    assert (out[unseen] == 0).all() and (lse[unseen] == -torch.inf).all()
    assert unseen[1].any() == (lengths[1] in (0, 17, 1))


@needs_build
def test_strided_inputs_keep_their_layout():
    apart = inputs(batch=2, heads=3)
    plan = random_plan(300, 64, heads=3)
    expected, _ = cpu.attend(*apart, plan)
    token_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in apart]
    fused = torch.stack([x.transpose(1, 2) for x in apart], 2).unbind(2)
    channels_apart = [x.mT.contiguous().mT for x in apart]
    for views in (token_major, [x.transpose(1, 2) for x in fused], channels_apart):
        out, _ = cpu.attend(*views, plan)
        assert torch.equal(out, expected)
    assert cpu.attend(*token_major, plan)[0].stride() == token_major[0].stride()


@needs_build
@pytest.mark.parametrize("scale", [None, 0.5])
def test_full_plan_is_dense_attention(scale):
    q, k, v = inputs()
    out, _ = cpu.attend(q, k, v, Plan.dense(300, 128), scale)
    dense = F.scaled_dot_product_attention(q, k, v, scale=scale)
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)


@needs_build
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_bfloat16_is_as_exact_as_torch(dim, density):
    q, k, v = inputs(dim=dim, dtype=torch.bfloat16)
    plan = random_plan(300, 64, density=density, order=torch.randperm(300))
    mask = reference.token_mask(plan, 1, 2)
    exact = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), attn_mask=mask)
    torch_error = (F.scaled_dot_product_attention(q, k, v, attn_mask=mask).double() - exact).square().mean()
    out, _ = cpu.attend(q, k, v, plan)
    assert (out.double() - exact).square().mean() <= 4 * torch_error


@needs_build
@pytest.mark.parametrize("dim", [24, 64])
def test_clusters_in_bfloat16(dim):
    """Clusters of more rows than a tile and of more keys than a pass holds among them."""
    q, k, v = inputs(tokens=1500, batch=2, dim=dim, dtype=torch.bfloat16)
    for queries, keys in ((2, 2), (30, 60)):
        plan = random_cluster_plan(1500, batch=2, heads=2, queries=queries, keys=keys)
        expected, expected_lse = reference.attend(q, k, v, plan)
        out, lse = cpu.attend(q, k, v, plan)
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@needs_build
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_uninitialised_memory_is_read_or_left(dtype):
    """With every allocation filled with NaN, scratch included."""
    q, k, v = inputs(batch=2, dim=72, dtype=dtype)
    order = torch.cat([torch.randperm(21), 21 + torch.randperm(279)])
    plan = random_plan(300, 24, batch=2, order=order, lengths=torch.tensor([300, 21]))
    expected, expected_lse = reference.attend(q, k, v, plan)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
        out, lse = cpu.attend(q, k, v, plan)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@needs_build
def test_threads_do_not_change_the_result():
    q, k, v = inputs(tokens=1000)
    plan = random_plan(1000, 64, heads=2)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(cpu.attend(q, k, v, plan)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@needs_build
def test_bad_block_numbers_and_scales_raise():
    q, k, v = inputs()
    plan = Plan.dense(300, 64)
    with pytest.raises(IndexError, match="key group 7 of 5"):
        cpu.attend(q, k, v, replace(plan, index=torch.full_like(plan.index, 7)))
    with pytest.raises(ValueError, match="scale"):
        cpu.attend(q, k, v, plan, scale=-1.0)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: torch.zeros(1, 1, 16, 64, device="meta"), "runs on the CPU"),
        (lambda: torch.zeros(1, 1, 16, 64, dtype=torch.float16), "float32 or bfloat16"),
        (lambda: torch.zeros(1, 1, 16, 20), "multiple of 8"),
        (lambda: torch.zeros(1, 1, 16, 1024), "multiple of 8 up to 512"),
        (lambda: torch.zeros(1, 1, 16, 64, requires_grad=True), "no backward"),
    ],
)
def test_refusals(make, sentence):
    q = make()
    assert sentence in cpu.why_not(q, q, Plan.dense(16, 16))


@pytest.fixture
def fresh_build(monkeypatch, tmp_path):
    """A process that has not built yet, with an empty cache folder."""
    monkeypatch.setenv("DIT_SPARSE_CACHE", str(tmp_path))
    cpu._build_failure.cache_clear()
    yield tmp_path
    cpu._build_failure.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "sentence"),
    [("/nowhere/g++", "no C++ compiler found"), ("false", "the build failed because")],
)
def test_machines_without_a_working_compiler(fresh_build, monkeypatch, compiler, sentence):
    monkeypatch.setenv("CXX", compiler)
    q = torch.zeros(1, 1, 16, 64)
    assert sentence in cpu.why_not(q, q, Plan.dense(16, 16))
    monkeypatch.setenv("CXX", "c++")
    assert sentence in cpu.why_not(q, q, Plan.dense(16, 16)), "the reason holds for the process"
    assert not list(fresh_build.iterdir())
    with pytest.raises(RuntimeError, match="cannot run"):
        cpu.attend(q, q, q, Plan.dense(16, 16))


def test_a_library_that_does_not_load_is_a_reason(fresh_build, monkeypatch):
    monkeypatch.setattr(cpu, "_built_library", lambda: fresh_build / "absent.so")
    assert "the build failed because" in cpu._build_failure()


def test_processes_that_build_at_once_leave_one_whole_file(tmp_path, monkeypatch):
    slow_compiler = tmp_path / "slow"
    slow_compiler.write_text(
        "#!/bin/sh\n"
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && target=$2; shift; done\n'
        '[ -n "$target" ] || exit 0\n'
        'printf half >"$target"; sleep 0.5; printf whole >>"$target"\n'
    )
    slow_compiler.chmod(slow_compiler.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("CXX", str(slow_compiler))
    monkeypatch.setenv("DIT_SPARSE_CACHE", str(tmp_path / "cache"))
    with multiprocessing.get_context("fork").Pool(2) as racers:
        first, second = racers.map(build_and_read, range(2), chunksize=1)
    assert first == second == "halfwhole"
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".so"]


def build_and_read(_):
    return cpu._built_library().read_text()


def test_import_builds_nothing(fresh_build):
    spec = importlib.util.spec_from_file_location("dit_sparse.kernels.imported_again", cpu.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert not list(fresh_build.iterdir())
