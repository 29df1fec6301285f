"""Every supported transformer class: exact where nothing is dropped, sparse where asked, tokens where the grid says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dit_sparse as ds
from dit_sparse.grid import Grid, Site
from tiny_models import Call, TinyModel, first_output, tiny_model, tiny_models

SETTINGS = dict(dense_steps=0, min_tokens=0, block=16, executor="reference")


@pytest.fixture(params=tiny_models())
def tiny(request) -> TinyModel:
    return tiny_models()[request.param]


def compute(tiny: TinyModel, arguments: dict) -> Tensor:
    return first_output(tiny_model(tiny.name)(**arguments, return_dict=False))


def recorded_queries(tiny: TinyModel, arguments: dict) -> list[tuple[Site, Tensor]]:
    """Return site and queries ``[B, H, N, D]`` of all sparse calls of one forward call."""
    recorded = []
    with ds.enable(tiny_model(tiny.name), "window", density=0.9, **SETTINGS) as run:
        run.observe(lambda site, q, k, plan: recorded.append((site, q.clone())))
        compute(tiny, arguments)
    return recorded


def changed_rows(before: Tensor, after: Tensor) -> list[int]:
    """Return the tokens whose queries differ in the first batch item."""
    return (before != after)[0].any(-1).any(0).nonzero().flatten().tolist()


def assert_exact_and_sparse(tiny: TinyModel, call: Call) -> None:
    """Assert that density 1 gives the stock output, and that density 0.5 computes half of the pairs."""
    stock = compute(tiny, tiny.arguments(call))
    calls = tiny.sites * (call.batch if tiny.unbatched else 1)
    dense = {"causal attention and dropout are not supported": calls} if tiny.causal_text else {}
    with ds.enable(tiny_model(tiny.name), "random_blocks", density=1.0, **SETTINGS) as run:
        full = compute(tiny, tiny.arguments(call))
    assert run.report().sparse_calls == calls and run.report().dense_calls == dense
    torch.testing.assert_close(full, stock, rtol=1e-4, atol=1e-5 * float(stock.abs().max()))
    with ds.enable(tiny_model(tiny.name), "random_blocks", density=0.5, **SETTINGS) as run:
        half = compute(tiny, tiny.arguments(call))
    assert run.report().sparse_calls == calls and run.report().dense_calls == dense
    assert run.report().density_achieved == pytest.approx(0.5, abs=0.01)
    assert not torch.equal(half, stock)


def test_exact_sparse_and_restored(tiny):
    call = Call(tiny.grids[0])
    stock = compute(tiny, tiny.arguments(call))
    assert_exact_and_sparse(tiny, Call(tiny.grids[0]))
    with ds.enable(tiny_model(tiny.name), "dense", **SETTINGS):
        assert compute(tiny, tiny.arguments(Call(tiny.grids[0]))).equal(stock)
    assert compute(tiny, tiny.arguments(Call(tiny.grids[0]))).equal(stock)


def test_another_size_and_a_batch(tiny):
    """A second size, and two prompts: of unequal length where the model takes a mask at the end of the sequence."""
    lengths = (20, 13) if tiny.masked else ()
    assert_exact_and_sparse(tiny, Call(tiny.grids[1], batch=1 if tiny.single else 2, lengths=lengths))


def test_tokens_lie_in_the_grid_as_the_model_orders_them(tiny):
    """A changed latent changes the queries of one token: the one that its frame, row and column give."""
    for grid in tiny.grids:
        site, queries = recorded_queries(tiny, tiny.arguments(Call(grid)))[0]
        for place in ((0, 0, 1), tuple(size - 1 for size in grid), (grid[0] // 2, 2, 1)):
            _, changed = recorded_queries(tiny, tiny.with_changed_token(Call(grid), place))[0]
            token = (place[0] * grid[1] + place[1]) * grid[2] + place[2]
            assert changed_rows(queries, changed) == [site.grid.before + token], (grid, place)


def test_text_lies_where_the_family_says(tiny):
    call = Call(tiny.grids[0])
    recorded = recorded_queries(tiny, tiny.arguments(call))
    assert recorded[-1][0].grid == Grid(*call.grid, *tiny.tokens_next_to_video(call))
    if tiny.side is None or not tiny.text:
        return
    first = next(i for i, (site, _) in enumerate(recorded) if site.grid.tokens > site.grid.video)
    site, queries = recorded[first]
    rows = changed_rows(queries, recorded_queries(tiny, tiny.with_changed_text(Call(call.grid)))[first][1])
    text = range(site.grid.before) if tiny.side == "before" else range(site.grid.video, site.grid.tokens)
    assert rows and set(rows) <= set(text)
