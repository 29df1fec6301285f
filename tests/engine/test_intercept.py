"""The interception of attention calls: which modules, and what reaches their processors."""

from __future__ import annotations

import inspect
import logging
import re

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from dit_sparse.engine.intercept import interception_of
from sparse_pipelines import (
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
