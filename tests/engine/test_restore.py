"""Enabling and disabling: the model is restored bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from diffusers import WanTransformer3DModel

import tiny_pipelines as tiny
from sparse_pipelines import (
    assert_same_objects,
    attributes_of,
    cached_pipeline,
    calls_per_step,
    enable_sparse,
    generate,
    generate_dense,
    generate_sparse,
)


def test_method_dense_equals_the_stock_pipeline(stock):
    plain, before = generate_dense(stock.name), attributes_of(stock)
    run = enable_sparse(stock, "dense")
    assert generate(stock).equal(plain)
    assert run.report().dense_calls == {"the schedule": calls_per_step(stock), "the method": 3 * calls_per_step(stock)}
    run.disable()
    run.disable()
    assert_same_objects(attributes_of(stock), before)
    assert generate(stock).equal(plain)


def test_with_block_restores_the_model(stock):
    plain, before = generate_dense(stock.name), attributes_of(stock)
    with enable_sparse(stock, density=0.3):
        assert not generate(stock).equal(plain)
    assert_same_objects(attributes_of(stock), before)
    assert generate(stock).equal(plain)


def test_hook_is_removed_from_a_new_pipeline():
    stock = tiny.ALL["wan"]()
    transformer, before = stock.pipe.transformer, attributes_of(stock)
    with enable_sparse(stock):
        assert len(transformer._forward_pre_hooks) == 1 and "forward" not in vars(transformer)
        generate(stock)
    assert_same_objects(attributes_of(stock), before)
    assert not transformer._forward_pre_hooks and not transformer._forward_hooks


def test_error_in_with_block_restores_the_model(wan):
    plain, before = generate_dense("wan"), attributes_of(wan)
    with pytest.raises(TypeError), enable_sparse(wan):
        wan.pipe(no_such_argument=1)
    assert_same_objects(attributes_of(wan), before)
    assert generate(wan).equal(plain)


def test_enabling_again_ends_the_first_run(wan):
    plain, before = generate_dense("wan"), attributes_of(wan)
    first, second = enable_sparse(wan, density=0.3), enable_sparse(wan, "dense")
    assert generate(wan).equal(plain)
    assert (first.report().sparse_calls, first.report().dense_calls) == (0, {})
    first.disable()
    assert generate(wan).equal(plain) and second.report().dense_calls["the method"] == 2 * 3 * calls_per_step(wan)
    second.disable()
    assert_same_objects(attributes_of(wan), before)


def test_bare_transformer_has_one_run_at_a_time(wan):
    before = attributes_of(wan)
    with enable_sparse(wan.pipe.transformer, density=0.3) as first:
        with pytest.raises(ValueError, match=r"call disable\(\) on the earlier run first"):
            enable_sparse(wan.pipe.transformer)
        with pytest.raises(ValueError, match=r"call disable\(\) on the earlier run first"):
            enable_sparse(wan)
        generate(wan)
        assert first.report().sparse_calls == 3 * calls_per_step(wan)
    assert_same_objects(attributes_of(wan), before)


def test_pipelines_run_independently(wan):
    ltx = cached_pipeline("ltx")
    other = replace(tiny.ALL["wan"](), name="other wan")
    alone = [generate_sparse(wan), generate_sparse(other, "window", density=0.6), generate_sparse(ltx, density=0.5)]
    with (
        enable_sparse(wan, density=0.3) as a,
        enable_sparse(other, "window", density=0.6) as b,
        enable_sparse(ltx, density=0.5) as c,
    ):
        together = [generate(wan), generate(other), generate(ltx)]
        reports = [run.report() for run in (a, b, c)]
    assert [x.equal(y) for x, y in zip(together, alone, strict=True)] == [True] * 3
    assert [report.sparse_calls for report in reports] == [3 * calls_per_step(x) for x in (wan, other, ltx)]
    assert [report.density_asked for report in reports] == [0.3, 0.6, 0.5]


def test_saving_while_enabled_saves_the_plain_model(tmp_path):
    stock = cached_pipeline("wan")
    transformer = stock.pipe.transformer
    state = {name: x.clone() for name, x in transformer.state_dict().items()}
    with enable_sparse(stock, density=0.3):
        generate(stock)
        assert transformer.state_dict().keys() == state.keys()
        transformer.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == state.keys() and all(loaded[name].equal(state[name]) for name in state)
