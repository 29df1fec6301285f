"""Arguments of ``enable``: bad ones raise one sentence before the model is changed."""

from __future__ import annotations

import re

import pytest
import torch

import dit_sparse as ds
from sparse_pipelines import (
    STEPS,
    assert_same_objects,
    attributes_of,
    cached_pipeline,
    calls_per_step,
    enable_sparse,
    generate,
    generate_dense,
    generate_sparse,
)


class Pipe:
    """A pipeline of any components."""

    def __init__(self, **components):
        self.components = components


def assert_one_sentence(call, message: str) -> None:
    """Assert that a call raises a ValueError whose text matches ``message`` and is one short sentence."""
    with pytest.raises(ValueError, match=message) as error:
        call()
    text = str(error.value)
    assert len(text) < 240 and "\n" not in text and not re.search(r"\. [A-Z]", text), text


DEEP: list = []
for _ in range(3000):
    DEEP = [DEEP]

BAD = {
    "unknown method": (dict(method="radiall"), "there is no method 'radiall'"),
    "no method": (dict(method=3), "method must be a .* or a dit_sparse.Method, got int"),
    "unknown setting": (dict(decaay=1.0), "routed has no setting 'decaay'"),
    "setting of a Method": (dict(method=ds.METHODS["radial"](), decay=1.0), "'decay'"),
    "setting out of range": (dict(method="window", radius=2.0), "radius"),
    "density 0": (dict(density=0.0), "1], got 0.0"),
    "density 2": (dict(density=2), "1], got 2"),
    "density -1": (dict(density=-1), "1], got -1"),
    "density nan": (dict(density=float("nan")), "1], got nan"),
    "density 2 of a Method": (dict(method=ds.METHODS["radial"](), density=2), "1], got 2"),
    "dense_steps 1.5": (dict(dense_steps=1.5), "dense_steps must be a count"),
    "dense_steps -1": (dict(dense_steps=-1), "dense_steps must be a count"),
    "dense_layers 1.5": (dict(dense_layers=1.5), "dense_layers must be a count"),
    "unknown executor": (dict(executor="gatherer"), "executor must be one of .* got 'gatherer'"),
    "block 20": (dict(block=20), r"block must be a multiple of 16 in \[16, 256\], got 20"),
    "block 0": (dict(block=0), r"block must be a multiple of 16 in \[16, 256\], got 0"),
    "block 512": (dict(block=512), r"block must be a multiple of 16 in \[16, 256\], got 512"),
    "block as text": (dict(block="64"), "block must be a whole number or none, got '64'"),
    "min_tokens as text": (dict(min_tokens="x"), "min_tokens must be a whole number or none, got 'x'"),
    "min_tokens -1": (dict(min_tokens=-1), "min_tokens must be in"),
    "steps inf": (dict(steps=float("inf")), "steps must be a whole number or none, got inf"),
    "steps 0": (dict(steps=0), "steps must be in"),
    "schedule as text": (dict(schedule="x"), "schedule must be a Schedule, got 'x'"),
    "no schedule": (dict(schedule=0), "schedule must be a Schedule, got 0"),
    "dense_steps as text": (dict(dense_steps="x"), "dense_steps must be a count"),
    "dense_steps true": (dict(dense_steps=True), "dense_steps must be a count .* got True"),
    "executor as list": (dict(executor=[1]), r"executor must be a string, got \[1\]"),
    "profile as number": (dict(profile=5), "a profile must be a name, a path or a Profile, got 5"),
    "deep setting": (dict(decay=DEEP), "nested too deeply"),
    "long name": (dict(executor="x" * 10**6), "executor must be one of"),
}


@pytest.mark.parametrize("settings, message", BAD.values(), ids=BAD)
def test_bad_setting_raises_one_sentence(wan, settings, message):
    before, names = attributes_of(wan), set(vars(wan.pipe))
    assert_one_sentence(lambda: ds.enable(wan.pipe, **settings), message)
    assert_same_objects(attributes_of(wan), before)
    assert set(vars(wan.pipe)) == names


MODELS = {
    "no transformer": (lambda: Pipe(), "Pipe has no transformer to make sparse"),
    "transformer None": (lambda: Pipe(transformer=None, vae=torch.nn.Linear(1, 1)), "Pipe has no transformer"),
    "unknown transformer": (lambda: Pipe(transformer=torch.nn.Linear(1, 1)), "no adapter .* supports Linear"),
    "unknown bare transformer": (lambda: torch.nn.Linear(1, 1), "no adapter .* supports Linear"),
    "no module": (lambda: "wan", "str has no transformer"),
    "a class": (lambda: Pipe, "a pipeline or transformer, got the class Pipe"),
}


@pytest.mark.parametrize("model, message", MODELS.values(), ids=MODELS)
def test_unsupported_model_raises_one_sentence(model, message):
    model = model()
    before = dict(vars(model)) if hasattr(model, "__dict__") else {}
    for enable in (ds.enable, ds.SparseAttnProcessor().attach):
        assert_one_sentence(lambda enable=enable: enable(model), message)
    assert before == (dict(vars(model)) if hasattr(model, "__dict__") else {})


def test_unsupported_second_transformer_leaves_the_first_unchanged(wan):
    pipe = Pipe(transformer=wan.pipe.transformer, transformer_2=torch.nn.Linear(1, 1))
    before = attributes_of(wan)
    assert_one_sentence(lambda: ds.enable(pipe), "no adapter .* supports Linear")
    assert_same_objects(attributes_of(wan), before)


def test_fraction_of_an_unknown_number_of_steps_raises():
    stock = cached_pipeline("ltx")
    before = attributes_of(stock)
    with enable_sparse(stock.pipe.transformer, dense_steps=0.25):
        assert_one_sentence(lambda: generate(stock), "the number of steps is unknown")
        assert_one_sentence(lambda: generate(stock), "the number of steps is unknown")
    assert_same_objects(attributes_of(stock), before)
    assert generate(stock).equal(generate_dense("ltx"))


@pytest.mark.parametrize("settings", [dict(dense_steps=1), dict(dense_steps=0.25, steps=STEPS)], ids=["count", "steps"])
def test_bare_transformer_gives_the_result_of_its_pipeline(stock, settings):
    if len(stock.transformers) > 1:
        pytest.skip("two transformers share their step only in a pipeline")
    expected = generate_sparse(stock, dense_steps=1)
    with enable_sparse(stock.pipe.transformer, density=0.3, **settings) as run:
        assert generate(stock).equal(expected)
        assert generate(stock).equal(expected)
    assert run.report().dense_calls == {"the schedule": 2 * calls_per_step(stock)}
