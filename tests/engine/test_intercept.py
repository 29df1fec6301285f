"""The interception of attention calls: which modules, and what reaches their processors."""

from __future__ import annotations

import functools
import inspect
import logging
import re

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import tiny_pipelines as tiny
from dit_sparse.engine.interception.intercept import interception_of
from sparse_pipelines import (
    STEPS,
    assert_near,
    cached_pipeline,
    count_layers,
    enable_sparse,
    expected_grids,
    generate,
    generate_sparse,
    intercepted_modules,
)


def test_only_video_self_attention_is_intercepted(stock):
    before = [dict(transformer.named_modules()) for transformer in stock.transformers]
    processors = [{path: getattr(m, "processor", None) for path, m in modules.items()} for modules in before]
    with enable_sparse(stock):
        for modules, original in zip(before, processors, strict=True):
            for path, module in modules.items():
                assert bool(interception_of(module)) == bool(re.search(stock.attn, path)), path
                assert interception_of(module) or getattr(module, "processor", None) is original[path]


def test_processors_keep_their_signatures(stock):
    """diffusers drops every keyword that a processor's __call__ does not name."""
    before = {
        module: inspect.signature(module.processor.__call__)
        for part in stock.transformers
        for module in part.modules()
        if hasattr(module, "processor")
    }
    with enable_sparse(stock):
        assert len(intercepted_modules(stock)) == count_layers(stock) * len(stock.transformers)
        for module in intercepted_modules(stock):
            assert inspect.signature(module.processor.__call__) == before[module]
            assert isinstance(module.processor, type(module.processor).__mro__[1])


def test_no_keyword_is_dropped(stock, caplog):
    diffusers = logging.getLogger("diffusers")
    diffusers.addHandler(caplog.handler)
    try:
        generate_sparse(stock)
    finally:
        diffusers.removeHandler(caplog.handler)
    assert not [message for message in caplog.messages if "not expected" in message or "ignored" in message]


def test_observed_queries_are_those_of_the_model(stock):
    """They are taken after projection, norm, text and rotary embedding."""
    tokens = expected_grids(stock)[0].tokens

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is F.scaled_dot_product_attention:
                q, k = (args or tuple(kwargs.values()))[:2]
                stock_calls.append((q, k)) if q.shape[2] == k.shape[2] == tokens else None
            return function(*args, **(kwargs or {}))

    stock_calls, observed = [], []
    with Recorder():
        generate(stock)
    with enable_sparse(stock, dense_steps=0) as run:
        run.observe(lambda site, q, k, plan: observed.append((q, k)))
        generate(stock)
    assert observed[0][0].equal(stock_calls[0][0]) and observed[0][1].equal(stock_calls[0][1])


def test_mochi_without_set_processor_is_intercepted():
    stock = cached_pipeline("mochi")
    module = stock.pipe.transformer.transformer_blocks[0].attn1
    assert not hasattr(module, "set_processor") and not hasattr(stock.pipe.transformer, "set_attn_processor")
    with enable_sparse(stock):
        assert interception_of(module)


def with_call(call: object, base: type = object, **members: object) -> object:
    """Return a processor of a class that has this ``__call__``."""
    return type("Own", (base,), {"__call__": call} | members)()


class CallableObject:
    def __init__(self, function):
        self.function = function

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def extend_dict(stock):
    return type(
        "Own", (dict,), {"__call__": type(stock).__call__, "_attention_backend": None, "_parallel_config": None}
    )()


PROCESSORS = {  # without code that can be exchanged, made from the stock processor
    "a partial": lambda stock: functools.partial(stock),
    "a function": lambda stock: lambda *args, **kwargs: stock(*args, **kwargs),
    "a bound method": lambda stock: stock.__call__,
    "__call__ is a partial": lambda stock: with_call(functools.partial(stock)),
    "__call__ is an object": lambda stock: with_call(CallableObject(stock)),
    "__call__ is cached": lambda stock: with_call(functools.lru_cache(lambda self, *args, **kw: stock(*args, **kw))),
    "slots": lambda stock: with_call(lambda self, *args, **kw: stock(*args, **kw), __slots__=()),
    "a dict": extend_dict,
    "a module": lambda stock: with_call(torch.nn.Module.__call__, torch.nn.Module, forward=CallableObject(stock)),
}


@pytest.mark.parametrize("make", PROCESSORS.values(), ids=PROCESSORS)
def test_processors_that_cannot_be_intercepted_are_untouched_and_counted(make, caplog):
    stock = tiny.ALL["wan"]()
    module = stock.pipe.transformer.blocks[0].attn1
    module.processor = processor = make(module.processor)
    with enable_sparse(stock, density=0.3, dense_steps=0) as run:
        generate(stock)
        assert module.processor is processor
    calls, report = STEPS * stock.calls, run.report()
    ((reason, count),) = report.dense_calls.items()
    assert count == calls and reason.endswith(" calls no attention function that can be intercepted")
    assert report.sparse_calls == (count_layers(stock) - 1) * calls and len(caplog.messages) == 1
    assert module.processor is processor and not module._forward_pre_hooks


def test_decorators_of_a_processor_are_kept():
    def double(function):
        @functools.wraps(function)
        def doubled(*args, **kwargs):
            return 2 * function(*args, **kwargs)

        return doubled

    stock = tiny.ALL["wan"]()
    module = stock.pipe.transformer.blocks[0].attn1
    stock_class = type(module.processor)
    module.processor = with_call(torch.no_grad()(double(stock_class.__call__)), stock_class)
    plain = generate(stock)
    with enable_sparse(stock, "window", density=1.0, dense_steps=0) as run:
        assert_near(generate(stock), plain)
    assert run.report().sparse_calls == STEPS * stock.calls * count_layers(stock)
