"""Tiny stock pipelines made sparse: cached pipelines, generations, recorded sites, and snapshots of their state."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

import dit_sparse as ds
import tiny_pipelines as tiny
from dit_sparse.engine.interception.intercept import interception_of
from dit_sparse.scoring import pool

STEPS = 4
SETTINGS = dict(schedule=ds.Schedule(replan_interval=1), block=16, min_tokens=0, executor="gather", dense_steps=1)
PLAN_EVERY_STEP = ds.Schedule(dense_steps=1, replan_interval=1)
PLAN_PER_BRANCH = ds.Schedule(dense_steps=1, replan_interval=1, per_branch=True)

VIDEO = [Image.radial_gradient("L").resize((112, 80)).convert("RGB")] * 17
IMAGE = VIDEO[0].resize((224, 160))
VARIANTS = {  # pipeline: family, arguments of the call, config of the transformer
    "WanVideoToVideoPipeline": ("wan", dict(video=VIDEO, strength=0.75), {}),
    "HunyuanVideoImageToVideoPipeline": (
        "hunyuan_video",
        dict(image=IMAGE),
        dict(image_condition_type="token_replace"),
    ),
    "CogVideoXVideoToVideoPipeline": ("cogvideox", dict(video=VIDEO, strength=0.75), {}),
    "CogVideoXImageToVideoPipeline": ("cogvideox", dict(image=IMAGE), dict(in_channels=8)),
    "LTXImageToVideoPipeline": ("ltx", dict(image=IMAGE), {}),
    "LTXConditionPipeline": ("ltx", dict(image=IMAGE, frame_index=16), {}),
}


def for_pipelines(*names: str) -> pytest.MarkDecorator:
    """Parametrize the fixture ``stock`` with pipelines of ``tiny_pipelines.ALL``."""
    return pytest.mark.parametrize("stock", names, indirect=True)


@functools.cache
def cached_pipeline(name: str) -> tiny.Tiny:
    """Return a stock pipeline, shared by all tests. Its VAE, which is slow, encodes each video once."""
    stock, encoded = tiny.ALL[name](), {}
    encode = stock.pipe.vae.encode

    def encode_once(video: torch.Tensor, **options):
        key = video.numpy().tobytes()
        if key not in encoded:
            encoded[key] = encode(video, **options)
        return encoded[key]

    stock.pipe.vae.encode = encode_once
    return stock


def make_variant(name: str) -> tiny.Tiny:
    """Return another pipeline of a family, an instance of our class with the components of a tiny one."""
    family, arguments, config = VARIANTS[name]
    stock, cls = tiny.ALL[family](**config), getattr(import_module(f"dit_sparse.pipelines.video.{family}"), name)
    components = stock.pipe.components | dict(image_processor=None)
    if name == "LTXConditionPipeline":  # has its own timesteps
        components["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = cls(**{part: components[part] for part in inspect.signature(cls).parameters if part in components})
    pipe.set_progress_bar_config(disable=True)
    accepted = inspect.signature(cls.__call__).parameters
    kwargs = lambda **other: {key: x for key, x in (stock.kwargs(**other) | arguments).items() if key in accepted}
    return replace(stock, pipe=pipe, kwargs=kwargs)


def generate(stock: tiny.Tiny, **other) -> torch.Tensor:
    """Return the latents of one generation."""
    return stock.pipe(**stock.kwargs(**other), output_type="latent").frames


@functools.cache
def generate_dense(name: str) -> torch.Tensor:
    """Return the latents of a stock pipeline, those of the cached one without sparse attention."""
    return generate(tiny.ALL[name]())  # not the cached pipeline, which may be sparse now


def enable_sparse(model, method="radial", **settings) -> ds.Run:
    """Enable sparse attention with the default settings of these tests.

    Args:
        model: a diffusers pipeline, a transformer, or a Tiny.
    """
    return ds.enable(getattr(model, "pipe", model), method, **SETTINGS | settings)


def generate_sparse(stock: tiny.Tiny, *method, density=0.3, other=None, **settings) -> torch.Tensor:
    """Return the latents of one generation with sparse attention; ``other`` are arguments of the pipeline call."""
    with enable_sparse(stock, *method, density=density, **settings):
        return generate(stock, **other or {})


def recorded_sites(stock: tiny.Tiny, other=None) -> list[ds.Site]:
    """Return the sites of all sparse calls of one generation."""
    recorded = []
    with enable_sparse(stock, density=0.3, dense_steps=0) as run:
        run.observe(lambda site, q, k, plan: recorded.append(site))
        generate(stock, **other or {})
    return recorded


def first_transformer_call(stock: tiny.Tiny) -> dict:
    """Return the keyword arguments of the first transformer call of a generation."""
    calls = []
    hook = stock.pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    generate(stock)
    hook.remove()
    return calls[0]


def attributes_of(stock: tiny.Tiny) -> dict:
    """Return every attribute of every module and processor of the transformers."""
    return {
        (number, path, type(owner).__name__, key): value
        for number, transformer in enumerate(stock.transformers)
        for path, module in transformer.named_modules()
        for owner in (module, getattr(module, "processor", None))
        if owner is not None
        for key, value in vars(owner).items()
        if key != "_diffusers_hook"  # diffusers' own, since the first call with a cache context
    }


def assert_same_objects(now: dict, before: dict) -> None:
    """Assert that two results of `attributes_of` hold identical objects."""
    assert now.keys() == before.keys()
    assert not [place for place, value in now.items() if value is not before[place]]


def intercepted_modules(stock: tiny.Tiny) -> list[torch.nn.Module]:
    """Return the attention modules that are intercepted now."""
    return [module for part in stock.transformers for module in part.modules() if interception_of(module)]


def count_layers(stock: tiny.Tiny) -> int:
    """Return the number of self-attention modules of one transformer."""
    return sum(bool(re.search(stock.attn, path)) for path, _ in stock.transformers[0].named_modules())


def expected_grids(stock: tiny.Tiny) -> list[ds.Grid]:
    """Return the grids of self-attention; Mochi drops padded text and attends one batch item at a time."""
    lengths = stock.valid if stock.name == "mochi" else [stock.text]
    return [ds.Grid(*stock.grid, **({stock.side: length} if stock.side else {})) for length in lengths]


def calls_per_step(stock: tiny.Tiny) -> int:
    """Return the number of self-attention calls in a step."""
    return count_layers(stock) * stock.calls * len(expected_grids(stock))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Assert that no absolute difference exceeds the tolerance."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@contextmanager
def attention_mask(stock: tiny.Tiny, mask: Tensor) -> Iterator[None]:
    """Pass a mask to the self-attention of Wan, which has none."""
    hooks = [
        block.attn1.register_forward_pre_hook(lambda module, args: (*args[:2], mask, *args[3:]))
        for block in stock.pipe.transformer.blocks
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True, kw_only=True)
class RunningMean(ds.Scorer):
    """Scores blocks by a running mean over the steps, so that stale or mixed memory changes the plan.

    Attributes:
        log: the site of every plan, with the steps that its memory had recorded before.
    """

    log: list = field(default_factory=list, compare=False)

    def score(self, q: Tensor, k: Tensor, v: Tensor | None, site: ds.Site, memory: dict) -> Tensor:
        self.log.append((site, memory.setdefault("steps", []).copy()))
        memory["steps"].append(site.step)
        score = pool(q, site.block) @ pool(k, site.block).mT
        memory["mean"] = (score + memory.get("mean", score)) / 2
        return memory["mean"]
