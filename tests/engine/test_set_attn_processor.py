"""``set_attn_processor``, ``prepare`` and the pipeline classes of ``dit_sparse.pipelines``."""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import diffusers
import pytest
import torch

import dit_sparse as ds
import tiny_pipelines as tiny
from dit_sparse.engine.interception.intercept import interception_of
from dit_sparse.pipelines.family import all_families
from sparse_pipelines import (
    SETTINGS,
    assert_same_objects,
    attributes_of,
    cached_pipeline,
    generate,
    generate_dense,
    generate_sparse,
)


@pytest.fixture
def our_wan() -> tiny.Tiny:
    """Our WanPipeline class with the components of the stock pipeline."""
    from dit_sparse.pipelines.video.wan import WanPipeline

    stock = cached_pipeline("wan")
    pipe = WanPipeline(**stock.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    return replace(stock, pipe=pipe)


def test_set_attn_processor_enables_and_restores(our_wan):
    plain, before = generate_dense("wan"), attributes_of(our_wan)
    assert isinstance(our_wan.pipe, diffusers.WanPipeline) and type(our_wan.pipe).__name__ == "WanPipeline"
    assert our_wan.pipe.sparse_run is None and generate(our_wan).equal(plain)
    processor = ds.SparseAttnProcessor("radial", density=0.3, **SETTINGS)
    our_wan.pipe.set_attn_processor(processor)
    assert generate(our_wan).equal(sparse_latents_of_wan())
    assert our_wan.pipe.sparse_run.report().sparse_calls == 12
    our_wan.pipe.set_attn_processor(None)
    assert our_wan.pipe.sparse_run is None
    assert_same_objects(attributes_of(our_wan), before)
    assert generate(our_wan).equal(plain)


@functools.cache
def sparse_latents_of_wan() -> torch.Tensor:
    return generate_sparse(tiny.ALL["wan"]())


def test_pipeline_class_saves_and_loads(our_wan, tmp_path):
    our_wan.pipe.save_pretrained(tmp_path)
    loaded = type(our_wan.pipe).from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    loaded.set_progress_bar_config(disable=True)
    loaded.set_attn_processor(ds.SparseAttnProcessor("radial", density=0.3, **SETTINGS))
    assert '"_class_name": "WanPipeline"' in (tmp_path / "model_index.json").read_text()
    # weights at other addresses in memory: sums can differ in their last digits
    torch.testing.assert_close(generate(replace(our_wan, pipe=loaded)), sparse_latents_of_wan(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["wan", "wan22"])
def test_diffusers_processor_replaces_the_sparse_one(name):
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    stock = tiny.ALL[name]()
    pipe, processor = ds.prepare(stock.pipe), WanAttnProcessor()
    assert ds.prepare(pipe) is pipe and pipe.sparse_run is None
    pipe.set_attn_processor(ds.SparseAttnProcessor("radial", density=0.3, **SETTINGS))
    assert pipe.sparse_run.report().sparse_calls == 0 and not generate(stock).equal(generate_dense(name))
    pipe.set_attn_processor(processor)
    assert pipe.sparse_run is None
    assert all(p is processor for part in stock.transformers for p in part.attn_processors.values())
    assert generate(stock).equal(generate_dense(name))


def test_prepare_works_on_every_pipeline(stock):
    pipe = ds.prepare(stock.pipe)
    pipe.set_attn_processor(ds.SparseAttnProcessor("dense", **SETTINGS))
    run = pipe.sparse_run
    pipe.set_attn_processor(ds.SparseAttnProcessor("window", **SETTINGS))
    assert pipe.sparse_run is not run and any(map(interception_of, stock.transformers[0].modules()))
    pipe.set_attn_processor(None)
    assert pipe.sparse_run is None and not any(map(interception_of, stock.transformers[0].modules()))


def test_pipeline_classes_match_those_of_diffusers():
    for family in all_families():
        module = import_module(f"dit_sparse.pipelines.{family.module}")
        assert module.FAMILY is family
        for name in module.FAMILY.pipelines:
            ours, stock = getattr(module, name), getattr(diffusers, name)
            assert issubclass(ours, stock) and ours.__name__ == name and ours is getattr(module, name)
            assert inspect.signature(ours) == inspect.signature(stock)
        for name in module.FAMILY.transformers:
            assert hasattr(diffusers, name)
        with pytest.raises(ImportError, match="NoSuchPipeline"):
            exec(f"from dit_sparse.pipelines.{family.module} import NoSuchPipeline")


def test_pipeline_modules_import_diffusers_lazily():
    lines = (
        "import sys, dit_sparse",
        *(f"import dit_sparse.pipelines.{family.module} as {family.name}" for family in all_families()),
        "assert not hasattr(wan, 'NoSuchPipeline')",
        "assert 'diffusers' not in sys.modules",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
