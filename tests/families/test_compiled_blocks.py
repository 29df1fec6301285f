"""Blocks of every family compile with ``fullgraph=True`` while sparse, in one graph, and give the same result."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

import dit_sparse as ds
from tiny_models import Call, compile_blocks, first_output, tiny_models

SETTINGS = dict(density=0.5, dense_steps=0, min_tokens=0, block=16, executor="reference")
QUICK = {
    "WanTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "LTX2VideoTransformer3DModel",
    "SD3Transformer2DModel",
}
BLOCK_MASKS = {"AnyFlowFARTransformer3DModel"}  # no tensor, so that the call stays in the graph
BREAK_THEMSELVES = {"HiDreamImageTransformer2DModel"}  # its experts select tokens by index


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


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
    with ds.enable(model, "random_blocks", **SETTINGS):
        expected = first_output(model(**tiny.arguments(call), return_dict=False))
    compile_blocks(model)
    with ds.enable(model, "random_blocks", **SETTINGS) as run:
        result = first_output(model(**tiny.arguments(call), return_dict=False))
    if name in BLOCK_MASKS:
        assert run.report().dense_calls == {"a compiled graph cannot pass on a BlockMask": tiny.sites}
        return
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert run.report().sparse_calls == tiny.sites and not counters["graph_break"]


@pytest.mark.parametrize(
    "name", ["FluxTransformer2DModel", pytest.param("Krea2Transformer2DModel", marks=pytest.mark.slow)]
)
def test_whole_model_compiles_where_the_grid_is_in_position_ids(name):
    """The ids are read at run time, so another size of the same number of tokens needs no new graph."""
    tiny, model = tiny_models()[name], tiny_models()[name].build()
    call = Call((1, 12, 16))
    with torch.no_grad(), ds.enable(model, "random_blocks", **SETTINGS):
        expected = first_output(model(**tiny.arguments(call), return_dict=False))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), ds.enable(compiled, "random_blocks", **SETTINGS) as run:
        result = first_output(compiled(**tiny.arguments(call), return_dict=False))
        graphs = counters["stats"]["unique_graphs"]
        first_output(compiled(**tiny.arguments(Call((1, 16, 12))), return_dict=False))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert run.report().sparse_calls == 2 * tiny.sites and not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == graphs and len(run.report().grids) == 2
