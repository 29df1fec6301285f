"""Sparse attention with other features of diffusers: half precision, backends, compilation, offload and caches."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.models.attention_dispatch import attention_backend

import tiny_pipelines as tiny
from sparse_pipelines import (
    STEPS,
    assert_near,
    attributes_of,
    cached_pipeline,
    calls_per_step,
    count_layers,
    enable_sparse,
    for_pipelines,
    generate,
    generate_dense,
    generate_sparse,
    intercepted_modules,
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", ["wan", "wan22_5b_i2v", "hunyuan_video", "cogvideox", "mochi", "ltx"])
def test_half_precision_is_kept(name, dtype):
    stock = tiny.ALL[name]()
    for part in stock.transformers:
        part.to(dtype)
    other = {key: x.to(dtype) for key, x in stock.kwargs().items() if key.endswith("embeds")}
    plain = generate(stock, **other)
    steps, dtypes = set(), set()
    with enable_sparse(stock, density=1.0) as run:
        run.observe(lambda site, q, k, plan: steps.add(site.step))
        for module in intercepted_modules(stock):
            module.register_forward_hook(
                lambda module, args, out: dtypes.update(x.dtype for x in (out if isinstance(out, tuple) else [out]))
            )
        out = generate(stock, **other)
    assert dtypes == {dtype} and out.dtype == plain.dtype
    assert steps == {1, 2, 3} and run.report().sparse_calls == 3 * calls_per_step(stock)
    assert float((out - plain).norm() / plain.norm()) < (0.02 if dtype == torch.float16 else 0.1)


@contextmanager
def use_backend(transformer: torch.nn.Module, name: str):
    """Select an attention backend, for the transformer and not for the process."""
    with attention_backend("native"):  # restores the default of the process, which set_attention_backend changes
        transformer.set_attention_backend(name)
        try:
            yield
        finally:
            transformer.reset_attention_backend()


@pytest.mark.parametrize("name", ["native", "_native_math"])
@for_pipelines("wan", "hunyuan_video", "ltx")
def test_attention_backend_is_restored(stock, name):
    transformer = stock.pipe.transformer
    backends = lambda: [getattr(p, "_attention_backend", None) for p in transformer.attn_processors.values()]
    unset = backends()
    with use_backend(transformer, name):
        plain, with_backend = generate(stock), backends()
        assert with_backend != unset
        with enable_sparse(stock, density=1.0) as run:
            assert_near(generate(stock), plain)
            assert backends() == with_backend
        assert run.report().sparse_calls == 3 * calls_per_step(stock)
        (reason,) = run.report().dense_calls
        assert reason == ("the schedule" if name == "native" else "the schedule, by the backend _native_math")
        assert run.report().density_run == pytest.approx(1.0)
    assert backends() == unset
    run = enable_sparse(stock, density=0.3)
    with use_backend(transformer, name):
        generate(stock)
        assert backends() == with_backend
        run.disable()
        assert backends() == with_backend
    assert backends() == unset
    assert generate(stock).equal(generate_dense(stock.name))


PAB = PyramidAttentionBroadcastConfig(
    spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 1000)
)
CPU = torch.device("cpu")
FEATURES = {
    "torch.compile": lambda pipe: setattr(pipe, "transformer", torch.compile(pipe.transformer, backend="eager")),
    "group offload": lambda pipe: pipe.transformer.enable_group_offload(CPU, CPU, "leaf_level"),
    "layerwise casting": lambda pipe: pipe.transformer.enable_layerwise_casting(torch.float16, torch.float32),
    "fused projections": lambda pipe: pipe.transformer.fuse_qkv_projections(),
    "attention broadcast": lambda pipe: pipe.transformer.enable_cache(
        replace(PAB, current_timestep_callback=lambda: pipe.current_timestep)
    ),
    "TaylorSeer": lambda pipe: pipe.transformer.enable_cache(TaylorSeerCacheConfig(cache_interval=2)),
}


@pytest.mark.parametrize("first", ["feature", "sparse attention"])
@pytest.mark.parametrize("enable_feature", FEATURES.values(), ids=FEATURES)
def test_density_1_equals_dense_with_other_features(enable_feature, first, fresh_compiler):
    plain, stock = tiny.ALL["wan"](), tiny.ALL["wan"]()
    enable_feature(plain.pipe)
    expected = generate(plain)
    if first == "feature":
        enable_feature(stock.pipe)
    with enable_sparse(stock, density=1.0) as run:
        if first == "sparse attention":
            enable_feature(stock.pipe)
        assert_near(generate(stock), expected)
    assert run.report().sparse_calls >= calls_per_step(cached_pipeline("wan"))
    assert generate(stock).equal(expected)


@pytest.mark.parametrize("first", ["compile", "enable"])
def test_compiled_blocks_give_the_same_result(first, fresh_compiler):
    stock = tiny.ALL["wan"]()
    expected = generate_sparse(stock)
    compile = lambda: stock.pipe.transformer.compile_repeated_blocks(fullgraph=False, backend="eager")
    if first == "compile":
        compile()
    with enable_sparse(stock, density=0.3) as run:
        if first == "enable":
            compile()
        assert_near(generate(stock), expected)
    assert_near(generate(stock), generate_dense("wan"))
    assert run.report().sparse_calls == 3 * calls_per_step(stock)


@for_pipelines("wan", "hunyuan_video", "ltx")
def test_first_block_cache_with_sparse_attention(stock):
    transformer = stock.pipe.transformer
    before, computed = attributes_of(stock), []
    with enable_sparse(stock, density=0.3, dense_steps=0) as run:
        run.observe(lambda site, q, k, plan: computed.append((site.step, site.layer)))
        transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
        try:
            cached = generate(stock)
            again = generate(stock)
        finally:
            transformer.disable_cache()
    assert cached.isfinite().all() and again.equal(cached) and not cached.equal(generate_sparse(stock, dense_steps=0))
    expected = {(0, layer) for layer in range(count_layers(stock))} | {(step, 0) for step in range(STEPS)}
    assert set(computed) == expected
    assert generate(stock).equal(generate_dense(stock.name))
    assert {key for key in attributes_of(stock).keys() - before.keys() if "processor" in key} == set()


def test_cache_enabled_first_survives():
    stock = tiny.ALL["wan"]()
    transformer = stock.pipe.transformer
    transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    cached = generate(stock)
    with enable_sparse(stock, density=1.0):
        assert_near(generate(stock), cached)
    assert generate(stock).equal(cached)
    transformer.disable_cache()
    assert generate(stock).equal(generate_dense("wan"))
