"""The CPU executor: agreement with the reference, unsupported calls, compilation."""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import stat
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from attention_cases import random_cluster_plan
from dit_sparse.kernels import cpu_library
from dit_sparse.kernels.executors import cpu, reference
from dit_sparse.plan import Plan, num_blocks

REASON = cpu.why_not(torch.zeros(1, 1, 16, 64), torch.zeros(1, 1, 16, 64), Plan.dense(16, 16))
requires_operator = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(autouse=True)
def fixed_seed():
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


@requires_operator
@pytest.mark.parametrize("block", [16, 24, 64, 100, 128, 256])
@pytest.mark.parametrize("tokens", [16, 300, 777])
def test_ragged_sizes(tokens, block):
    assert_agrees(*inputs(tokens=tokens), random_plan(tokens, block, heads=2))


@requires_operator
@pytest.mark.parametrize("dim", [8, 32, 64, 72, 80, 96, 128, 256])
def test_head_dims(dim):
    assert_agrees(*inputs(dim=dim), random_plan(300, 64))


@requires_operator
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_plans_shared_by_items_and_heads(batch, heads):
    assert_agrees(*inputs(batch=2, heads=3), random_plan(300, 32, batch, heads))


@requires_operator
def test_many_passes_with_growing_scores():
    """The running maximum rises with every pass, so the accumulated output is rescaled."""
    q, k, v = inputs(tokens=2048, heads=1)
    k = k * torch.linspace(0.1, 4, 2048)[:, None]
    assert_agrees(q, k, v, random_plan(2048, 64, density=0.7))


@requires_operator
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("order_shape", [None, (), (1, 1), (2, 1), (1, 4), (2, 4)])
def test_orders_and_grouped_heads(kv_heads, order_shape):
    order = None
    if order_shape is not None:
        order = torch.rand(*order_shape, 300).argsort(-1)
    plan = random_plan(300, 64, heads=4, order=order)
    assert_agrees(*inputs(batch=2, heads=4, kv_heads=kv_heads), plan)


@requires_operator
@pytest.mark.parametrize("lengths", [[300, 17], [1, 256], [299, 0]])
def test_lengths(lengths):
    plan = random_plan(300, 64, batch=2, lengths=torch.tensor(lengths))
    out, lse = assert_agrees(*inputs(batch=2), plan)
    without_keys = torch.isinf(lse)
    assert (out[without_keys] == 0).all() and (lse[without_keys] == -torch.inf).all()
    assert without_keys[1].any() == (lengths[1] in (0, 17, 1))


@requires_operator
def test_strided_inputs_keep_their_layout():
    contiguous = inputs(batch=2, heads=3)
    plan = random_plan(300, 64, heads=3)
    expected, _ = cpu.attend(*contiguous, plan)
    token_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in contiguous]
    fused_qkv = torch.stack([x.transpose(1, 2) for x in contiguous], 2).unbind(2)
    channel_major = [x.mT.contiguous().mT for x in contiguous]
    for views in (token_major, [x.transpose(1, 2) for x in fused_qkv], channel_major):
        out, _ = cpu.attend(*views, plan)
        assert torch.equal(out, expected)
    assert cpu.attend(*token_major, plan)[0].stride() == token_major[0].stride()


@requires_operator
@pytest.mark.parametrize("scale", [None, 0.5])
def test_dense_plan_equals_sdpa(scale):
    q, k, v = inputs()
    out, _ = cpu.attend(q, k, v, Plan.dense(300, 128), scale)
    dense = F.scaled_dot_product_attention(q, k, v, scale=scale)
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)


@requires_operator
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_bfloat16_is_as_accurate_as_sdpa(dim, density):
    q, k, v = inputs(dim=dim, dtype=torch.bfloat16)
    plan = random_plan(300, 64, density=density, order=torch.randperm(300))
    mask = reference.token_mask(plan, 1, 2)
    exact = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), attn_mask=mask)
    torch_error = (F.scaled_dot_product_attention(q, k, v, attn_mask=mask).double() - exact).square().mean()
    out, _ = cpu.attend(q, k, v, plan)
    assert (out.double() - exact).square().mean() <= 4 * torch_error


@requires_operator
@pytest.mark.parametrize("dim", [24, 64])
def test_clusters_in_bfloat16(dim):
    """Some clusters have more queries than a tile, or more keys than a pass."""
    q, k, v = inputs(tokens=1500, batch=2, dim=dim, dtype=torch.bfloat16)
    for queries, keys in ((2, 2), (30, 60)):
        plan = random_cluster_plan(1500, batch=2, heads=2, queries=queries, keys=keys)
        expected, expected_lse = reference.attend(q, k, v, plan)
        out, lse = cpu.attend(q, k, v, plan)
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@requires_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uninitialized_memory_does_not_affect_the_result(dtype):
    """Every allocation, including buffers, is filled with NaN."""
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


@requires_operator
def test_result_is_independent_of_the_number_of_threads():
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


@requires_operator
def test_invalid_key_groups_raise():
    q, k, v = inputs()
    plan = Plan.dense(300, 64)
    with pytest.raises(IndexError, match=r"key groups of a plan must be in \[0, 5\), got 7"):
        cpu.attend(q, k, v, replace(plan, index=torch.full_like(plan.index, 7)))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(device="meta"), "requires CPU tensors, got meta tensors"),
        (dict(dtype=torch.float16), "requires float32 or bfloat16, the same for all inputs, got torch.float16"),
        (dict(dim=20), "multiple of 8, at most 512, got 20"),
        (dict(dim=1024), "multiple of 8, at most 512, got 1024"),
        (dict(requires_grad=True), "has no backward pass"),
    ],
    ids=str,
)
def test_why_not(options, reason):
    q = torch.zeros(1, 1, 16, options.pop("dim", 64), **options)
    assert reason in cpu.why_not(q, q, Plan.dense(16, 16))


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """An empty cache folder, and no operator compiled in this process."""
    monkeypatch.setenv("DIT_SPARSE_CACHE", str(tmp_path))
    cpu_library.build_error.cache_clear()
    yield tmp_path
    cpu_library.build_error.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/nowhere/g++", "requires a C++ compiler on the PATH, found none of /nowhere/g++"),
        ("false", "compiling the CPU operator failed: false exited with 1"),
    ],
)
def test_why_not_without_a_working_compiler(empty_cache, monkeypatch, compiler, reason):
    monkeypatch.setenv("CXX", compiler)
    q = torch.zeros(1, 1, 16, 64)
    assert reason in cpu.why_not(q, q, Plan.dense(16, 16))
    monkeypatch.setenv("CXX", "c++")
    assert reason in cpu.why_not(q, q, Plan.dense(16, 16)), "compilation is not repeated in the process"
    assert not list(empty_cache.iterdir())
    with pytest.raises(RuntimeError, match="executor 'cpu' is unavailable"):
        cpu.attend(q, q, q, Plan.dense(16, 16))


def test_why_not_if_the_library_cannot_be_loaded(empty_cache, monkeypatch):
    monkeypatch.setattr(cpu_library, "compiled_library", lambda name: empty_cache / "absent.so")
    assert "the compiled operator cannot be loaded" in cpu_library.build_error("block_sparse")


@pytest.fixture
def slow_compiler(tmp_path, monkeypatch) -> None:
    """Set $CXX to a script that writes "half", waits, and writes "whole"."""
    slow_compiler = tmp_path / "slow"
    slow_compiler.write_text(
        "#!/bin/sh\n"
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && target=$2; shift; done\n'
        '[ -n "$target" ] || exit 0\n'
        'printf half >"$target"; sleep 0.5; printf whole >>"$target"\n'
    )
    slow_compiler.chmod(slow_compiler.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("CXX", str(slow_compiler))


def test_processes_that_compile_concurrently_store_one_complete_library(slow_compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("DIT_SPARSE_CACHE", str(tmp_path / "cache"))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        first, second = pool.map(compile_and_read, range(2), chunksize=1)
    assert first == second == "halfwhole"
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".so"]


def compile_and_read(_):
    return cpu_library.compiled_library("block_sparse").read_text()


def test_library_is_compiled_with_an_unwritable_cache_folder(slow_compiler, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("DIT_SPARSE_CACHE", str(tmp_path / "slow" / "cache"))
    with caplog.at_level(logging.WARNING, "dit_sparse"):
        assert compile_and_read(0) == "halfwhole"
    assert "cannot write to the cache folder" in caplog.text


def test_import_compiles_nothing(empty_cache):
    spec = importlib.util.spec_from_file_location("dit_sparse.kernels.imported_again", cpu.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert not list(empty_cache.iterdir())
