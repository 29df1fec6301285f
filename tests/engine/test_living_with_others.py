"""A sparse model next to code that copies, saves, wraps, fuses, offloads and calls it from threads."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import threading
import weakref
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchHeunDiscreteScheduler
from diffusers.models.attention_dispatch import attention_backend
from torch import nn

import dit_sparse as ds
import tiny_pipelines as tiny
from dit_sparse.engine.interception.intercept import interception_of
from sparse_pipelines import (
    STEPS,
    cached_pipeline,
    calls_per_step,
    count_layers,
    enable_sparse,
    generate,
    generate_dense,
)


def sparse_calls(stock: tiny.Tiny, run: ds.Run) -> int:
    """Return the number of sparse calls of one more generation."""
    before = run.report().sparse_calls
    generate(stock)
    return run.report().sparse_calls - before


# --- others replace the forward, the processor or the attention function


def test_model_offload_does_not_end_the_run():
    stock = tiny.ALL["wan"]()
    stock.pipe.enable_model_cpu_offload(device="cpu")
    with enable_sparse(stock, density=0.3) as run:
        expected = (STEPS - 1) * calls_per_step(stock)
        assert [sparse_calls(stock, run) for _ in range(3)] == [expected] * 3
        forward = stock.pipe.transformer.forward
    assert stock.pipe.transformer.forward is forward  # the hook of others stays


@pytest.mark.parametrize("name", ["cogvideox", "hunyuan_video", "ltx", "wan"])
def test_fused_projections_stay_sparse_and_unfuse_after_the_run(name):
    stock = tiny.ALL[name]()
    transformer, plain = stock.pipe.transformer, generate(stock)
    with enable_sparse(stock, density=0.3) as run:
        expected = sparse_calls(stock, run)
        transformer.fuse_qkv_projections()
        assert sparse_calls(stock, run) == expected
    transformer.unfuse_qkv_projections()
    torch.testing.assert_close(generate(stock), plain, rtol=0, atol=2e-5)
    assert not any(map(interception_of, transformer.modules()))


def test_replaced_sdpa_is_still_intercepted(monkeypatch):
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: original(*args, **kwargs))
    for name in ("wan", "cogvideox"):
        stock = cached_pipeline(name)
        with enable_sparse(stock, density=0.3) as run:
            assert sparse_calls(stock, run) == (STEPS - 1) * calls_per_step(stock)


def test_processor_with_its_own_attention_is_counted_and_reported_once(caplog):
    class OwnAttention:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
            return hidden_states

    stock = tiny.ALL["wan"]()
    with caplog.at_level(logging.WARNING, "dit_sparse"), enable_sparse(stock, density=0.3, dense_steps=0) as run:
        stock.pipe.transformer.blocks[0].attn1.processor = OwnAttention()
        generate(stock)
    report, calls = run.report(), STEPS * stock.calls
    assert report.dense_calls == {"OwnAttention calls no attention function that can be intercepted": calls}
    assert report.sparse_calls == (count_layers(stock) - 1) * calls
    assert caplog.text.count("OwnAttention") == 1
    assert isinstance(stock.pipe.transformer.blocks[0].attn1.processor, OwnAttention)


def test_forward_that_is_not_observed_is_counted(caplog):
    stock = tiny.ALL["wan"]()
    with caplog.at_level(logging.WARNING, "dit_sparse"), enable_sparse(stock, density=0.3, dense_steps=0) as run:
        transformer = stock.pipe.transformer
        stock.pipe.transformer.register_forward_pre_hook(lambda *_: None)
        transformer._forward_pre_hooks.clear()
        generate(stock)
    assert run.report().dense_calls == {
        "the forward call of the transformer was not observed": STEPS * calls_per_step(stock)
    }
    assert caplog.text.count("not observed") == 1


def test_dense_steps_use_the_global_backend():
    stock = cached_pipeline("wan")
    with attention_backend("_native_math"):
        plain = generate(stock)
        with enable_sparse(stock, density=0.3, executor="auto") as run:
            generate(stock)
        with enable_sparse(stock, "dense") as dense:
            assert generate(stock).equal(plain)
    assert run.report().dense_calls == {"the schedule, by the backend _native_math": calls_per_step(stock)}
    assert dense.report().sparse_calls == 0


# --- copies and files


def test_copy_of_a_sparse_pipeline_is_stock():
    stock = tiny.ALL["wan"]()
    plain = generate(stock)
    with enable_sparse(stock, density=0.3) as run:
        other = copy.deepcopy(stock.pipe)
        assert other.sparse_run is None and not any(map(interception_of, other.transformer.modules()))
        before = run.report().sparse_calls
        assert other(**stock.kwargs(), output_type="latent").frames.equal(plain)
        assert run.report().sparse_calls == before
        with ds.enable(other, "window", density=0.5) as own:
            other(**stock.kwargs(), output_type="latent")
        assert own.report().sparse_calls or own.report().dense_calls
        assert sparse_calls(stock, run) > 0


@pytest.mark.parametrize("name", ["wan", "cogvideox", "mochi"])
def test_saved_transformer_is_stock(name):
    stock = tiny.ALL[name]()
    transformer, plain = stock.pipe.transformer, generate(stock)
    with enable_sparse(stock, density=0.3):
        generate(stock)
        file = io.BytesIO()
        torch.save(transformer, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert type(next(m for m in loaded.modules() if hasattr(m, "processor")).processor).__name__[:6] != "Sparse"
    stock.pipe.transformer = loaded
    assert generate(stock).equal(plain)


@pytest.mark.parametrize("active", [True, False])
def test_pipeline_can_be_pickled(active):
    stock = tiny.ALL["wan"]()
    plain = generate(stock)
    run = enable_sparse(stock, density=0.3)
    if not active:
        run.disable()
    loaded = pickle.loads(pickle.dumps(stock.pipe))
    run.disable()
    assert loaded.sparse_run is None
    assert loaded(**stock.kwargs(), output_type="latent").frames.equal(plain)
    loaded.set_attn_processor(ds.SparseAttnProcessor("window", density=0.3))
    assert loaded.sparse_run is not None and stock.pipe.sparse_run is not loaded.sparse_run


def test_disabled_run_does_not_keep_the_model_alive():
    stock = tiny.ALL["wan"]()
    run = enable_sparse(stock, density=0.3)
    generate(stock)
    processor = stock.pipe.transformer.blocks[0].attn1.processor
    run.disable()
    transformer = weakref.ref(stock.pipe.transformer)
    del stock
    import gc

    gc.collect()
    assert transformer() is None and run.report().sparse_calls > 0
    assert processor.dit_sparse_interception.attend is None


# --- dtypes and tensor modes


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox", "mochi", "ltx"])
@pytest.mark.parametrize("executor", ["gather", "cpu"])
def test_autocast_computes_as_sdpa_would(name, executor):
    stock = cached_pipeline(name)
    with torch.autocast("cpu", torch.bfloat16):
        plain = generate(stock)
        with enable_sparse(stock, "window", density=1.0, executor=executor) as run:
            out = generate(stock)
    assert out.dtype == plain.dtype and run.report().sparse_calls > 0
    assert (out - plain).norm() < 0.1 * plain.norm()


@pytest.mark.parametrize("method", ["window", "svg2", "adaspa", "rettention", "xattention", "sparsed"])
def test_inference_mode_may_alternate(method):
    stock = cached_pipeline("wan")
    with enable_sparse(stock, method, density=0.3):
        with torch.inference_mode():
            first = generate(stock)
        assert generate(stock).equal(first)
        with torch.inference_mode():
            assert generate(stock).equal(first)


@pytest.mark.parametrize("projection", ["to_q", "to_k", "to_v"])
def test_gradient_of_one_projection_is_not_lost(projection):
    stock = tiny.ALL["wan"]()
    transformer = stock.pipe.transformer
    weights = [getattr(block.attn1, projection).weight.requires_grad_() for block in transformer.blocks]
    inputs = dict(timestep=torch.tensor([500]), encoder_hidden_states=torch.randn(1, 24, 32), return_dict=False)
    inputs["hidden_states"] = torch.randn(1, 16, 5, 10, 14)

    def gradients() -> list[torch.Tensor]:
        return torch.autograd.grad(transformer(**inputs)[0].square().sum(), weights)

    plain = gradients()
    with enable_sparse(transformer, "window", density=0.3, dense_steps=0):
        assert all(a.equal(b) for a, b in zip(gradients(), plain, strict=True))


# --- threads, steps, batches


def test_threads_have_their_own_steps_and_plans():
    stock = cached_pipeline("wan")
    requests = [dict(seed=0, num_inference_steps=4), dict(seed=1, num_inference_steps=6, height=112, width=80)]

    def answer(request: dict) -> torch.Tensor:
        pipe = copy.copy(stock.pipe)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        return pipe(**stock.kwargs(**request), output_type="latent").frames

    with enable_sparse(stock, "svg2", density=0.3):
        alone = [answer(request) for request in requests]
        for _ in range(2):
            results: list = [None, None]

            def work(number: int, results=results) -> None:
                results[number] = answer(requests[number])

            threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert all(a.equal(b) for a, b in zip(results, alone, strict=True))


@pytest.mark.parametrize("steps", [4, 5])
def test_second_order_scheduler_counts_every_evaluation(steps):
    stock = tiny.ALL["wan"]()
    stock.pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    seen = []
    with enable_sparse(stock, "asa", density=0.3, dense_steps=0.25, schedule=ds.Schedule(replan_interval=2)) as run:
        run.observe(lambda site, q, k, plan: seen.append((site.step, site.steps, site.branch, plan)))
        generate(stock, num_inference_steps=steps)
    evaluations = len(stock.pipe.scheduler.timesteps)
    first = int(0.25 * evaluations)
    layer_0 = [(step, plan) for step, total, branch, plan in seen if " cond " in branch][:: count_layers(stock)]
    assert [step for step, _ in layer_0] == list(range(first, evaluations))
    plans = [plan for _, plan in layer_0]
    assert [a is b for a, b in pairwise(plans)] == [(step - first) % 2 == 0 for step in range(first, evaluations - 1)]


def test_step_that_does_not_advance_is_reported(caplog):
    transformer = tiny.ALL["wan"]().pipe.transformer
    inputs = dict(timestep=torch.tensor([500]), encoder_hidden_states=torch.randn(1, 24, 32))
    with caplog.at_level(logging.WARNING, "dit_sparse"), enable_sparse(transformer, dense_steps=1), torch.no_grad():
        for seed in range(70):
            torch.manual_seed(seed)
            transformer(hidden_states=torch.randn(1, 16, 1, 2, 2), **inputs)
    assert caplog.text.count("has not advanced") == 1


# --- wrappers


class Parallel(nn.Module):
    """As DistributedDataParallel holds its module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class Adapter(nn.Module):
    """As PEFT holds its model: it calls ``forward`` of the inner module, past its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = module

    def forward(self, *args, **kwargs):
        return self.base_model.model.forward(*args, **kwargs)


@pytest.mark.parametrize("wrap", [Parallel, Adapter, lambda module: Parallel(Adapter(module))])
def test_wrapped_transformer_is_found(wrap):
    transformer = tiny.ALL["wan"]().pipe.transformer
    inputs = dict(timestep=torch.tensor([500]), encoder_hidden_states=torch.randn(1, 24, 32), return_dict=False)
    inputs["hidden_states"] = torch.randn(1, 16, 5, 10, 14)
    wrapped = wrap(transformer)
    with torch.no_grad():
        plain = wrapped(**inputs)[0]
        with enable_sparse(wrapped, density=0.3, dense_steps=0) as run:
            assert not wrapped(**inputs)[0].equal(plain)
        assert run.report().sparse_calls == len(transformer.blocks) and not run.report().dense_calls
        assert wrapped(**inputs)[0].equal(plain)


def test_dense_output_is_that_of_the_stock_pipeline_for_every_family():
    for name in tiny.ALL:
        dense = generate_dense(name)
        with enable_sparse(cached_pipeline(name), "dense"):
            assert generate(cached_pipeline(name)).equal(dense), name
