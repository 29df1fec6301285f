"""Blocks of every family compile with ``fullgraph=True`` while sparse, in one graph, and give the same result."""

from __future__ import annotations

import re

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

import dit_sparse as ds
from dit_sparse.pipelines.family import family_of
from tiny_models import Call, tiny_models

SETTINGS = dict(density=0.5, dense_steps=0, min_tokens=0, block=16, executor="reference")
QUICK = {
    "WanTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "LTX2VideoTransformer3DModel",
    "SD3Transformer2DModel",
}
BREAK_THEMSELVES = {"HiDreamImageTransformer2DModel"}  # its experts select tokens by index


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compile_blocks(model: torch.nn.Module) -> None:
    """Compile repeated blocks as diffusers does, or the blocks of the sites where a class names none."""
    if model._repeated_blocks:
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        return
    sites = family_of(model).sites
    paths = {re.match(r"(.*?\.\d+)\.", path)[1] for path, _ in model.named_modules() if re.fullmatch(sites, path)}
    for path in sorted(paths):
        model.get_submodule(path).compile(fullgraph=True, backend="eager")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in tiny_models()]
)
def test_blocks_compile_with_fullgraph(name):
    tiny, call = tiny_models()[name], Call(tiny_models()[name].grids[0])
    model = tiny.build()
    if name in BREAK_THEMSELVES:
        compile_blocks(model)
        with pytest.raises(torch._dynamo.exc.UserError):
            model(**tiny.arguments(call))
        return
    first = lambda output: output[0][0] if isinstance(output[0], list) else output[0]
    with ds.enable(model, "random_blocks", **SETTINGS):
        expected = first(model(**tiny.arguments(call), return_dict=False))
    compile_blocks(model)
    with ds.enable(model, "random_blocks", **SETTINGS) as run:
        result = first(model(**tiny.arguments(call), return_dict=False))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert run.report().sparse_calls == tiny.sites and not counters["graph_break"]
