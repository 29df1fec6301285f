"""Tiny stock pipelines made sparse: generations, sites, and every attribute before and after."""

from __future__ import annotations

import functools
import inspect
import re
from dataclasses import dataclass, field, replace
from importlib import import_module

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

import dit_sparse as ds
import tiny_pipelines as tiny
from dit_sparse.scoring import pool

STEPS = 4
SETTINGS = dict(schedule=ds.Schedule(replan_interval=1), block=16, min_tokens=0, executor="gather", dense_steps=1)
APART = ds.Schedule(dense_steps=1, replan_interval=1, per_branch=True)


@functools.cache
def built(name: str) -> tiny.Tiny:
    """The stock pipeline, once for all tests. Its VAE, slow and not our matter, encodes a video once."""
    stock, encoded = tiny.ALL[name](), {}
    encode = stock.pipe.vae.encode

    def encode_once(video: torch.Tensor, **options):
        key = video.numpy().tobytes()
        if key not in encoded:
            encoded[key] = encode(video, **options)
        return encoded[key]

    stock.pipe.vae.encode = encode_once
    return stock


@functools.cache
def dense_latents(name: str) -> torch.Tensor:
    return latents(built(name))


def latents(stock: tiny.Tiny, **other) -> torch.Tensor:
    """One generation, undecoded."""
    return stock.pipe(**stock.kwargs(**other), output_type="latent").frames


def sparse(model, method="radial", **settings) -> ds.Run:
    """A diffusers pipeline, a transformer or a Tiny made sparse, by default as these tests like it."""
    return ds.enable(getattr(model, "pipe", model), method, **SETTINGS | settings)


def sparse_latents(stock: tiny.Tiny, *method, density=0.3, other=None, **settings) -> torch.Tensor:
    with sparse(stock, *method, density=density, **settings):
        return latents(stock, **other or {})


def sites(stock: tiny.Tiny, other=None) -> list[ds.Site]:
    """Where one generation asks for plans."""
    seen = []
    with sparse(stock, density=0.3, dense_steps=0) as run:
        run.observe(lambda site, q, k, plan: seen.append(site))
        latents(stock, **other or {})
    return seen


def trace(stock: tiny.Tiny) -> dict:
    """Every attribute of every module and processor, the very objects."""
    return {
        (number, path, type(owner).__name__, key): value
        for number, transformer in enumerate(stock.transformers)
        for path, module in transformer.named_modules()
        for owner in (module, getattr(module, "processor", None))
        if owner is not None
        for key, value in vars(owner).items()
    }


def assert_same_objects(now: dict, before: dict) -> None:
    assert now.keys() == before.keys()
    assert not [place for place, value in now.items() if value is not before[place]]


def layers(stock: tiny.Tiny) -> int:
    """Self-attention modules of one transformer."""
    return sum(bool(re.search(stock.attn, path)) for path, _ in stock.transformers[0].named_modules())


def grids(stock: tiny.Tiny) -> list[ds.Grid]:
    """What self-attention sees; Mochi drops padded text and attends one batch item at a time."""
    lengths = stock.valid if stock.name == "mochi" else [stock.text]
    return [ds.Grid(*stock.grid, **({stock.side: length} if stock.side else {})) for length in lengths]


def calls_per_step(stock: tiny.Tiny) -> int:
    return layers(stock) * stock.calls * len(grids(stock))


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


def variant(name: str) -> tiny.Tiny:
    """Another pipeline, of our class, around the parts of a Tiny."""
    family, other, config = VARIANTS[name]
    stock, cls = tiny.ALL[family](**config), getattr(import_module(f"dit_sparse.pipelines.{family}"), name)
    parts = stock.pipe.components | dict(image_processor=None)
    if name == "LTXConditionPipeline":  # gives its own timesteps
        parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = cls(**{part: parts[part] for part in inspect.signature(cls).parameters if part in parts})
    pipe.set_progress_bar_config(disable=True)
    accepted = inspect.signature(cls.__call__).parameters
    arguments = lambda **more: {key: x for key, x in (stock.kwargs(**more) | other).items() if key in accepted}
    return replace(stock, pipe=pipe, kwargs=arguments)


@dataclass(frozen=True, kw_only=True)
class Drifting(ds.Scorer):
    """Scores by a running mean over the steps, so that whatever is stale or mixed up changes the plan. ``log`` holds
    every site that was planned, with the steps its memory had seen by then."""

    log: list = field(default_factory=list, compare=False)

    def score(self, q: Tensor, k: Tensor, site: ds.Site, memory: dict) -> Tensor:
        self.log.append((site, memory.setdefault("steps", []).copy()))
        memory["steps"].append(site.step)
        score = pool(q, site.block) @ pool(k, site.block).mT
        memory["mean"] = (score + memory.get("mean", score)) / 2
        return memory["mean"]


def near(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
