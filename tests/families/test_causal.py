"""Models whose masks are causal by groups of frames, and models with a cache of keys."""

from __future__ import annotations

from functools import cache, partial
from math import prod
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache
from torch import Tensor, nn

import dit_sparse as ds
from dit_sparse.engine.dispatcher import AttentionDispatcher
from dit_sparse.engine.masks.causal import CausalParts, read_causal
from dit_sparse.grid import Grid
from dit_sparse.pipelines.family import family_of
from tiny_models import Call, first_output, tiny_models

SETTINGS = dict(dense_steps=0, min_tokens=0, block=16, executor="reference")
SKYREELS, FAR, GRID = "SkyReelsV2Transformer3DModel", "AnyFlowFARTransformer3DModel", (4, 8, 8)
REFINER = "SanaWMLTX2RefinerTransformer3DModel"
CHUNKS = [1, 2, 1, 1]  # the first one is packed into larger patches


@cache
def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    extra = {SKYREELS: dict(num_frame_per_block=2), FAR: dict(chunk_partition=CHUNKS)}.get(name, {})
    return getattr(diffusers, name)(**tiny_models()[name].config | extra).eval().requires_grad_(False)


def cached_chunk() -> dict:
    """Return the arguments of the last chunk, with a filled cache of the others."""
    heads, generator = tiny_models()[FAR].config, torch.Generator().manual_seed(3)
    keys = lambda tokens: torch.randn(
        2, 1, heads["num_attention_heads"], tokens, heads["attention_head_dim"], generator=generator
    )
    cached = [{"full_cache": keys(3 * 2 * 64), "compressed_cache": keys(4 * 16)} for _ in range(2)]
    flag = {"num_cached_chunks": 3, "is_cache_step": False}
    arguments = tiny_models()[FAR].arguments(Call((1, 8, 8)))
    return arguments | dict(chunk_partition=CHUNKS, kv_cache=cached, kv_cache_flag=flag)


@cache
def refiner_cache() -> Any:
    """Return a cache with the keys of one first frame and of two refined ones."""
    cache = SanaWMRefinerKVCache(2)
    for number, mode in enumerate(("capture_pre_rope", "inject_and_capture_post_rope")):
        model(REFINER)(**refined_frames(1 + number, cache, mode))
        for layer in range(2):
            one = cache.get(layer)
            if number == 0:
                one.store_sink(*one.get_captured_pre_rope())
            else:
                one.store_history(*one.get_captured_post_rope())
        cache.sink_pe = refined_frames(1)["video_rotary_emb"]
    return cache


def refined_frames(frames: int, kv_cache: Any = None, mode: str | None = None) -> dict:
    return tiny_models()[REFINER].arguments(Call((frames, 8, 8))) | dict(kv_cache=kv_cache, kv_cache_mode=mode)


def all_chunks(**changes) -> dict:
    return tiny_models()[FAR].arguments(Call((5, 8, 8))) | dict(chunk_partition=CHUNKS) | changes


CASES = {  # transformer, arguments, grids of the calls
    "SkyReels V2": (SKYREELS, lambda: tiny_models()[SKYREELS].arguments(Call(GRID)), ["2x8x8", "4x8x8"]),
    "FAR without a cache": (FAR, all_chunks, ["16 text + 2x8x8", "16 text + 3x8x8", "16 text + 4x8x8"]),
    "FAR with a cache": (FAR, cached_chunk, ["16 text + 4x8x8 + 64 text"]),
    "refiner of SANA-WM": (REFINER, lambda: refined_frames(2, refiner_cache(), "inject"), ["5x8x8"]),
}


def compute(name: str) -> Tensor:
    transformer, arguments, _ = CASES[name]
    return first_output(model(transformer)(**arguments(), return_dict=False))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", ["random_blocks", "radial", "svg2", "routed"])
def test_density_1_is_exact_and_lower_ones_are_met(name, method):
    """The density refers to the pairs that the mask allows, whatever the method's order and clusters."""
    transformer, _, grids = CASES[name]
    stock = compute(name)
    if method == "random_blocks":
        with ds.enable(model(transformer), "dense", **SETTINGS):
            assert compute(name).equal(stock)
        with ds.enable(model(transformer), method, density=1.0, **SETTINGS) as run:
            torch.testing.assert_close(compute(name), stock, rtol=1e-4, atol=1e-5 * float(stock.abs().max()))
        assert run.report().sparse_calls == 2 * len(grids)
    with ds.enable(model(transformer), method, density=0.5, **SETTINGS) as run:
        sparse = compute(name)
    assert run.report().grids == grids and not sparse.equal(stock) and sparse.isfinite().all()
    assert run.report().density_achieved == pytest.approx(0.5, abs=0.01)
    assert compute(name).equal(stock)


@pytest.mark.parametrize("name", ["SkyReels V2", "FAR without a cache"])
def test_outputs_are_those_of_the_plans_within_the_mask_of_the_model(name, monkeypatch):
    """Oracle: the softmax over the pairs that a plan keeps, none of which the model's own mask excludes."""
    plans, calls, stock = [], [], AttentionDispatcher.attend

    def attend(self, site, call):
        out = stock(self, site, call)
        calls.append((call, out))
        return out

    monkeypatch.setattr(AttentionDispatcher, "attend", attend)
    with ds.enable(model(CASES[name][0]), "svg2", density=0.4, **SETTINGS) as run:
        run.observe(lambda site, q, k, plan: plans.append((site, plan)))
        compute(name)
    per_call = len(plans) // len(calls)
    for number, (call, out) in enumerate(calls):
        tokens = call.q.shape[2]
        keep = torch.zeros(call.q.shape[1], tokens, tokens, dtype=torch.bool)
        for site, plan in plans[number * per_call : (number + 1) * per_call]:
            rows = torch.arange(site.first_query, site.grid.tokens)
            keep[:, rows, : site.grid.tokens] = plan.token_mask(rows)[0]
        if name == "SkyReels V2":
            allowed = call.mask[0, 0]
        else:
            position = torch.arange(tokens)
            allowed = call.mask.mask_mod(0, 0, position[:, None], position[None])
        assert not (keep & ~allowed).any()
        used = keep.any(-1)[0]
        scores = (call.q[0] @ call.k[0].mT * call.q.shape[-1] ** -0.5).masked_fill(~keep, -torch.inf)
        expected = scores[:, used].softmax(-1) @ call.v[0]
        torch.testing.assert_close(out[0][:, used], expected, rtol=1e-4, atol=1e-5)


def test_a_later_frame_changes_no_earlier_one():
    arguments, transformer = CASES["SkyReels V2"][1], model(SKYREELS)
    changed = arguments()
    changed["hidden_states"][:, :, 2:] += 1
    with ds.enable(transformer, "svg2", density=0.5, **SETTINGS):
        before, after = (first_output(transformer(**one, return_dict=False)) for one in (arguments(), changed))
    assert before[:, :, :2].equal(after[:, :, :2]) and not before[:, :, 2:].equal(after[:, :, 2:])


def test_calls_that_write_the_cache_are_exact():
    """FAR encodes a finished chunk once, with the causal mask; the cache is the result."""
    caches = []
    for density in (None, 1.0):
        keys = lambda tokens: torch.zeros(2, 1, 2, tokens, 16)
        cached = [{"full_cache": keys(3 * 2 * 64), "compressed_cache": keys(4 * 16)} for _ in range(2)]
        flag = {"num_cached_chunks": 3, "is_cache_step": True}
        call = partial(model(FAR), **all_chunks(kv_cache=cached, kv_cache_flag=flag), return_dict=False)
        if density is None:
            call()
        else:
            with ds.enable(model(FAR), "random_blocks", density=density, **SETTINGS) as run:
                call()
            assert run.report().sparse_calls and run.report().grids[-1] == "48 text + 2x8x8"
        caches.append(cached[1]["full_cache"])
    torch.testing.assert_close(caches[1], caches[0], rtol=1e-4, atol=1e-5)


GROUPS = torch.arange(4).repeat_interleave(6)  # four frames of 2 x 3 tokens
CAUSAL = GROUPS[:, None] >= GROUPS


@pytest.mark.parametrize("form", ["bool", "additive"])
def test_masks_that_are_causal_by_frames_are_read(form):
    grid = Grid(4, 2, 3, before=5)
    mask = F.pad(CAUSAL, (5, 0), value=True)
    mask = torch.cat([mask[:1].expand(5, -1), mask])  # the prefix belongs to the first frame
    mask = mask if form == "bool" else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    assert read_causal(mask[None, None], grid) == CausalParts((11, 17, 23, 29))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (CAUSAL.T, "different keys"),
        (CAUSAL & (GROUPS[:, None] <= GROUPS + 1), "different keys"),
        (torch.ones(24, 24, dtype=torch.bool).tril(), "within a frame"),
        (CAUSAL & (GROUPS[:, None] > 0), "different keys"),
        (torch.stack([CAUSAL, CAUSAL.T]), "different keys"),
    ],
)
def test_other_masks_are_refused_with_the_reason(mask, words):
    assert words in read_causal(mask, Grid(4, 2, 3))


@pytest.mark.parametrize("rope_type", ["interleaved", "split"])
@pytest.mark.parametrize("grid", [(1, 8, 8), (3, 5, 7), (2, 1, 9), (3, 6, 1)])
@pytest.mark.parametrize("first", [0, 5])
def test_grid_of_the_refiner_is_read_from_its_rope(grid, rope_type, first):
    config = dict(tiny_models()[REFINER].config) | dict(rope_type=rope_type, num_layers=1)
    transformer = diffusers.SanaWMLTX2RefinerTransformer3DModel(**config)
    frames, height, width = grid
    rotary = transformer.build_rotary_emb_for_absolute_positions(
        2, list(range(first, first + frames)), height, width, torch.device("cpu"), fps=60.0
    )
    arguments = dict(hidden_states=torch.zeros(2, prod(grid), 4), video_rotary_emb=rotary)
    assert family_of(transformer).grid(transformer.config, arguments) == grid


def test_pipeline_of_the_refiner_is_exact():
    """Blocks of three frames after a growing cache, each with all denoising steps."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    nothing = dict.fromkeys(("connectors", "tokenizer", "text_encoder"))
    pipe = diffusers.SanaWMLTX2Refiner(transformer=model(REFINER), scheduler=scheduler, **nothing)
    pipe._encode_prompt = lambda prompt, **_: (torch.ones(1, 20, 16), torch.ones(1, 20))
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 6, 8, generator=torch.Generator().manual_seed(2))
    refine = lambda: pipe(latents, "", fps=16.0, generator=torch.manual_seed(3), output_type="latent")
    stock = refine()
    with ds.enable(pipe, "random_blocks", density=1.0, **SETTINGS) as run:
        torch.testing.assert_close(refine(), stock, rtol=1e-4, atol=1e-5)
    report = run.report()
    assert report.grids == ["1x6x8", "4x6x8", "7x6x8", "8x6x8"] and not report.dense_calls
    assert report.sparse_calls == 2 * (1 + 3 * 4)
