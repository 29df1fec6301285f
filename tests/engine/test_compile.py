"""Sparse attention under ``torch.compile``: one graph, no break, no recompile, and the same result."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from diffusers import WanTransformer3DModel
from torch._dynamo.utils import counters

import dit_sparse as ds
import tiny_pipelines as tiny
from sparse_pipelines import generate

SETTINGS = dict(density=0.3, min_tokens=0, executor="gather", block=16, dense_steps=1, steps=3)
LAYERS, RECOMPILE_LIMIT = 5, 3  # a graph per layer would exceed the limit


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        yield
    torch._dynamo.reset()


def wan(layers: int = LAYERS) -> WanTransformer3DModel:
    torch.manual_seed(0)
    sizes = dict(num_attention_heads=2, attention_head_dim=32, text_dim=32, freq_dim=32, ffn_dim=64)
    model = WanTransformer3DModel(num_layers=layers, in_channels=4, out_channels=4, **sizes)
    return model.eval().requires_grad_(False)


def denoise(model) -> torch.Tensor:
    """Return the outputs of three steps."""
    noise = lambda seed, *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    text = noise(9, 1, 24, 32)
    return torch.stack(
        [
            model(noise(step, 1, 4, 5, 12, 16), torch.tensor([timestep]), text, return_dict=False)[0]
            for step, timestep in enumerate((900.0, 600.0, 300.0))
        ]
    )


def compiled(model, whole: bool, backend: str):
    if whole:
        return torch.compile(model, fullgraph=True, backend=backend)
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    return model


@pytest.mark.parametrize(
    ("whole", "backend", "layers", "compile_first"),
    [
        (False, "eager", LAYERS, False),
        (False, "eager", LAYERS, True),
        (True, "eager", LAYERS, False),
        (True, "eager", LAYERS, True),
        pytest.param(True, "inductor", 2, True, marks=pytest.mark.slow),
    ],
)
def test_compiled_model_is_one_graph_and_equal(whole, backend, layers, compile_first):
    plain = denoise(wan(layers))
    model = wan(layers)
    with ds.enable(model, "radial", **SETTINGS):
        expected = denoise(model)
    fast = compiled(model, whole, backend) if compile_first else model
    if compile_first:
        denoise(fast)
    graphs = counters["stats"]["unique_graphs"]
    with ds.enable(model, "radial", **SETTINGS) as run:
        fast = fast if compile_first else compiled(model, whole, backend)
        tolerance = dict(rtol=0, atol=0 if backend == "eager" else 1e-5)
        torch.testing.assert_close(denoise(fast), expected, **tolerance)
        sparse_graphs = counters["stats"]["unique_graphs"]
        torch.testing.assert_close(denoise(fast), expected, **tolerance)  # a second clip
        assert counters["stats"]["unique_graphs"] == sparse_graphs <= graphs + 1 + whole
        assert not counters["graph_break"] and not counters["recompiles"]
        assert run.report().sparse_calls == 2 * 2 * layers and run.report().dense_calls == {"the schedule": 2 * layers}
    torch.testing.assert_close(denoise(fast), plain, **tolerance)


@pytest.mark.parametrize("name", ["wan22", "hunyuan_video", "cogvideox", "ltx"])
def test_blocks_of_pipelines_compile_with_fullgraph(name):
    """Two transformers, masked text, text before the video, no text; all classes are in tests/families."""
    stock = tiny.ALL[name]()
    settings = SETTINGS | {"steps": None, "density": 0.4}
    with ds.enable(stock.pipe, "radial", **settings):
        expected = generate(stock)
    for transformer in stock.transformers:
        if transformer._repeated_blocks:
            transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        else:
            for block in transformer.transformer_blocks:
                block.compile(fullgraph=True, backend="eager")
    with ds.enable(stock.pipe, "radial", **settings) as run:
        torch.testing.assert_close(generate(stock), expected, rtol=0, atol=1e-5)
    assert not counters["graph_break"] and run.report().sparse_calls > 0


class OwnAttention:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return hidden_states


@pytest.mark.parametrize("whole", [False, True])
def test_processors_that_cannot_be_intercepted_are_counted_at_every_step(whole):
    model = wan(2)
    model.blocks[0].attn1.processor = OwnAttention()
    with ds.enable(model, "radial", **SETTINGS) as run:
        denoise(compiled(model, whole, "eager"))
    missed = {"OwnAttention calls no attention function that can be intercepted": 3}
    assert run.report().dense_calls == missed | {"the schedule": 1} and not counters["graph_break"]
