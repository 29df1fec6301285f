"""Stock diffusers pipelines made sparse, and back: what must not change does not, and the report counts the rest."""

from __future__ import annotations

import functools
import inspect
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from importlib import import_module

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

import dit_sparse as ds
import tiny_pipelines as tiny
from dit_sparse.engine.intercept import is_intercepted
from dit_sparse.pipelines.family import FAMILIES
from sparse_pipelines import (
    SETTINGS,
    STEPS,
    VARIANTS,
    assert_same_objects,
    built,
    calls_per_step,
    dense_latents,
    grids,
    latents,
    layers,
    sites,
    sparse,
    sparse_latents,
    trace,
    variant,
)

# --- there and back


def test_dense_is_the_stock_pipeline_bit_for_bit(stock):
    plain, before = dense_latents(stock.name), trace(stock)
    run = sparse(stock, "dense")
    assert latents(stock).equal(plain)
    assert run.report().dense_calls == {"the schedule": calls_per_step(stock), "the method": 3 * calls_per_step(stock)}
    run.disable()
    run.disable()
    assert_same_objects(trace(stock), before)
    assert latents(stock).equal(plain)


def test_leaving_with_restores_everything(stock):
    plain, before = dense_latents(stock.name), trace(stock)
    with sparse(stock, density=0.3):
        assert not latents(stock).equal(plain)
    assert_same_objects(trace(stock), before)
    assert latents(stock).equal(plain)


def test_a_pipeline_that_never_ran_is_left_without_a_hook():
    stock = tiny.ALL["wan"]()
    before = trace(stock)
    with sparse(stock):
        assert "forward" in vars(stock.pipe.transformer)
        latents(stock)
    assert_same_objects(trace(stock), before)
    assert "forward" not in vars(stock.pipe.transformer) and not hasattr(stock.pipe.transformer, "_diffusers_hook")


def test_an_error_inside_with_restores_everything(wan):
    plain, before = dense_latents("wan"), trace(wan)
    with pytest.raises(TypeError), sparse(wan):
        wan.pipe(no_such_argument=1)
    assert_same_objects(trace(wan), before)
    assert latents(wan).equal(plain)


def test_enabling_again_ends_the_first_run(wan):
    plain, before = dense_latents("wan"), trace(wan)
    first, second = sparse(wan, density=0.3), sparse(wan, "dense")
    assert latents(wan).equal(plain)
    assert (first.report().sparse_calls, first.report().dense_calls) == (0, {})
    first.disable()
    assert latents(wan).equal(plain) and second.report().dense_calls["the method"] == 2 * 3 * calls_per_step(wan)
    second.disable()
    assert_same_objects(trace(wan), before)


def test_a_bare_transformer_has_one_run_at_a_time(wan):
    before = trace(wan)
    with sparse(wan.pipe.transformer, density=0.3) as first:
        with pytest.raises(ValueError, match=r"disable\(\) the earlier run first"):
            sparse(wan.pipe.transformer)
        with pytest.raises(ValueError, match=r"disable\(\) the earlier run first"):
            sparse(wan)
        latents(wan)
        assert first.report().sparse_calls == 3 * calls_per_step(wan)
    assert_same_objects(trace(wan), before)


def test_two_pipelines_at_once_do_not_mix(wan):
    ltx = built("ltx")
    other = replace(tiny.ALL["wan"](), name="other wan")
    alone = [sparse_latents(wan), sparse_latents(other, "window", density=0.6), sparse_latents(ltx, density=0.5)]
    with sparse(wan, density=0.3) as a, sparse(other, "window", density=0.6) as b, sparse(ltx, density=0.5) as c:
        together = [latents(wan), latents(other), latents(ltx)]
        reports = [run.report() for run in (a, b, c)]
    assert [x.equal(y) for x, y in zip(together, alone, strict=True)] == [True] * 3
    assert [report.sparse_calls for report in reports] == [3 * calls_per_step(x) for x in (wan, other, ltx)]
    assert [report.density_asked for report in reports] == [0.3, 0.6, 0.5]


# --- what a run computes, and its report


@pytest.mark.parametrize("method", ["radial", "window", "random_blocks"])
def test_density_1_is_dense(stock, method):
    plain = dense_latents(stock.name)
    torch.testing.assert_close(sparse_latents(stock, method, density=1.0), plain, rtol=0, atol=2e-5)


def test_sparse_is_counted_as_the_schedule_says(stock):
    pairs = []
    with sparse(stock, density=0.3) as run:
        run.observe(lambda site, q, k, plan: pairs.append((q.shape[0] * site.grid.tokens**2, plan.density)))
        out = latents(stock)
        report = run.report()
    assert out.isfinite().all() and (out - dense_latents(stock.name)).abs().max() > 0.1
    assert report.sparse_calls == len(pairs) == 3 * calls_per_step(stock)
    assert report.dense_calls == {"the schedule": calls_per_step(stock)}
    assert report.executors == {"gather": report.sparse_calls}
    assert set(report.grids) == {str(grid) for grid in grids(stock)}
    achieved = sum(n * density for n, density in pairs) / sum(n for n, _ in pairs)
    assert report.density_achieved == pytest.approx(achieved)
    assert report.density_run == pytest.approx((1 + 3 * achieved) / 4)
    assert report.density_asked == 0.3
    assert 0.29 < achieved < (0.45 if stock.side == "after" else 0.301)  # text is always kept
    assert report.attention_seconds > report.planning_seconds > 0


def test_dense_layers_stay_dense(stock):
    with sparse(stock, density=0.3, dense_layers=1) as run:
        latents(stock)
    per_layer = calls_per_step(stock) // layers(stock)
    assert run.report().sparse_calls == 3 * per_layer * (layers(stock) - 1)
    assert run.report().dense_calls == {"the schedule": calls_per_step(stock) + 3 * per_layer}


def test_a_report_reads_well(wan):
    with sparse(wan, density=0.3) as run:
        assert str(run.report()).splitlines()[:2] == [
            "radial: density asked 0.300, achieved -, whole run -",
            "  grid       -",
        ]
        latents(wan)
    report = run.report()
    assert str(report).splitlines()[:4] == [
        f"radial: density asked 0.300, achieved {report.density_achieved:.3f}, whole run {report.density_run:.3f}",
        "  grid       5x5x7",
        "  sparse     12 calls, 12 by gather",
        "  dense      4 calls: the schedule",
    ]
    assert json.loads(json.dumps(report.as_dict()))["settings"]["decay"] == ds.METHODS["radial"]().decay


def test_reference_frames_are_part_of_the_grid():
    stock = built("wan_vace")
    other = dict(reference_images=[Image.linear_gradient("L").resize((112, 80)).convert("RGB")])
    plain = latents(stock, **other)
    with sparse(stock, density=1.0) as run:
        torch.testing.assert_close(latents(stock, **other), plain, rtol=0, atol=2e-5)
    assert run.report().grids == ["6x5x7"] and run.report().sparse_calls == 3 * calls_per_step(stock)


# --- where the pipeline is


def test_every_site_is_asked_once(stock):
    seen = sites(stock)
    branches = {
        "wan": ["cond", "uncond"], "hunyuan_video": ["cond"], "cogvideox": ["cond_uncond"], "mochi": ["cond_uncond"],
        "ltx": ["cond_uncond"],
    }  # fmt: skip
    names = next(names for family, names in branches.items() if stock.name.startswith(family))
    parts = ["transformer"] * 2 + ["transformer_2" if stock.name == "wan22" else "transformer"] * 2
    expected = Counter(
        (grid, step, layer, f"{parts[step]} {name} {turn}")
        for turn, grid in enumerate(grids(stock))
        for step in range(STEPS)
        for layer in range(layers(stock))
        for name in names
    )
    assert Counter((site.grid, site.step, site.layer, site.branch) for site in seen) == expected
    assert {(site.steps, site.layers, site.block) for site in seen} == {(STEPS, layers(stock), 16)}


def test_guidance_in_two_calls_makes_two_branches():
    seen = sites(built("hunyuan_video"), other=dict(true_cfg_scale=4.0))
    places = [(site.step, site.branch) for site in seen if site.layer == 0]
    assert places == [(step, f"transformer {name} 0") for step in range(STEPS) for name in ("cond", "uncond")]


def test_a_second_generation_starts_at_step_0(stock):
    first, second = sites(stock), []
    with sparse(stock, density=0.3, dense_steps=0) as run:
        latents(stock)
        run.observe(lambda site, q, k, plan: second.append(site))
        latents(stock)
    assert first == second


def test_branches_without_a_cache_context_are_numbered():
    places = [(site.step, site.layer, site.branch) for site in sites(variant("WanVideoToVideoPipeline"))]
    assert places == [(s, n, f"transformer call {c} 0") for s in range(3) for c in (0, 1) for n in range(2)]


def test_the_scheduler_may_be_exchanged():
    stock = tiny.ALL["hunyuan_video"]()
    with sparse(stock, density=0.3) as run:
        stock.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        latents(stock, num_inference_steps=6)
    assert run.report().sparse_calls == 5 * calls_per_step(stock)


# --- the other pipelines of the families


@pytest.mark.parametrize("name", VARIANTS)
def test_other_pipelines_of_a_family(name):
    stock, seen = variant(name), []
    assert type(stock.pipe).__name__ == name and isinstance(stock.pipe, getattr(diffusers, name))
    plain = latents(stock)
    with sparse(stock, density=1.0) as run:
        run.observe(lambda site, q, k, plan: seen.append(site))
        torch.testing.assert_close(latents(stock), plain, rtol=0, atol=2e-5)
    steps = 3 if "VideoToVideo" in name else 4  # strength 0.75 leaves out the first, and the second is the first to run
    assert {(site.step, site.steps) for site in seen} == {(step, steps) for step in range(1, steps)}
    frames = 6 if name == "LTXConditionPipeline" else 5  # the keyframe stands before the video
    assert {(site.grid.frames, site.grid.height, site.grid.width) for site in seen} == {(frames, 5, 7)}
    assert not latents(stock).equal(sparse_latents(stock))


def test_our_pipeline_classes_are_those_of_diffusers():
    for family in FAMILIES:
        module = import_module(f"dit_sparse.pipelines.{family}")
        for name in module.FAMILY.pipelines:
            ours, theirs = getattr(module, name), getattr(diffusers, name)
            assert issubclass(ours, theirs) and ours.__name__ == name and ours is getattr(module, name)
            assert inspect.signature(ours) == inspect.signature(theirs)
        for name in module.FAMILY.transformers:
            assert hasattr(diffusers, name)
        with pytest.raises(ImportError, match="NoSuchPipeline"):
            exec(f"from dit_sparse.pipelines.{family} import NoSuchPipeline")


# --- what is left alone


def test_only_video_self_attention_is_diverted(stock):
    before = [dict(transformer.named_modules()) for transformer in stock.transformers]
    processors = [{path: getattr(m, "processor", None) for path, m in modules.items()} for modules in before]
    with sparse(stock):
        for modules, original in zip(before, processors, strict=True):
            for path, module in modules.items():
                assert is_intercepted(module) == bool(re.search(stock.attn, path)), path
                assert is_intercepted(module) or getattr(module, "processor", None) is original[path]


# --- set_attn_processor


@pytest.fixture
def ours() -> tiny.Tiny:
    """Our WanPipeline class around the stock parts."""
    from dit_sparse.pipelines.wan import WanPipeline

    stock = built("wan")
    pipe = WanPipeline(**stock.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    return replace(stock, pipe=pipe)


def test_set_attn_processor_on_our_pipeline_class(ours):
    plain, before = dense_latents("wan"), trace(ours)
    assert isinstance(ours.pipe, diffusers.WanPipeline) and type(ours.pipe).__name__ == "WanPipeline"
    assert ours.pipe.sparse_run is None and latents(ours).equal(plain)
    processor = ds.SparseAttnProcessor("radial", density=0.3, **SETTINGS)
    ours.pipe.set_attn_processor(processor)
    assert latents(ours).equal(sparse_latents_once())
    assert ours.pipe.sparse_run.report().sparse_calls == 12
    ours.pipe.set_attn_processor(None)
    assert ours.pipe.sparse_run is None
    assert_same_objects(trace(ours), before)
    assert latents(ours).equal(plain)


@functools.cache
def sparse_latents_once() -> torch.Tensor:
    return sparse_latents(tiny.ALL["wan"]())


def test_our_pipeline_class_loads_and_saves_like_the_stock_one(ours, tmp_path):
    ours.pipe.save_pretrained(tmp_path)
    again = type(ours.pipe).from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    again.set_progress_bar_config(disable=True)
    again.set_attn_processor(ds.SparseAttnProcessor("radial", density=0.3, **SETTINGS))
    assert '"_class_name": "WanPipeline"' in (tmp_path / "model_index.json").read_text()
    # weights at other places in memory: sums may differ in their last digits
    torch.testing.assert_close(latents(replace(ours, pipe=again)), sparse_latents_once(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["wan", "wan22"])
def test_a_stock_processor_takes_the_place_of_ours(name):
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    stock = tiny.ALL[name]()
    pipe, processor = ds.prepare(stock.pipe), WanAttnProcessor()
    assert ds.prepare(pipe) is pipe and pipe.sparse_run is None
    pipe.set_attn_processor(ds.SparseAttnProcessor("radial", density=0.3, **SETTINGS))
    assert pipe.sparse_run.report().sparse_calls == 0 and not latents(stock).equal(dense_latents(name))
    pipe.set_attn_processor(processor)
    assert pipe.sparse_run is None
    assert all(p is processor for part in stock.transformers for p in part.attn_processors.values())
    assert latents(stock).equal(dense_latents(name))


def test_prepare_works_on_every_pipeline(stock):
    pipe = ds.prepare(stock.pipe)
    pipe.set_attn_processor(ds.SparseAttnProcessor("dense", **SETTINGS))
    run = pipe.sparse_run
    pipe.set_attn_processor(ds.SparseAttnProcessor("window", **SETTINGS))
    assert pipe.sparse_run is not run and any(map(is_intercepted, stock.transformers[0].modules()))
    pipe.set_attn_processor(None)
    assert pipe.sparse_run is None and not any(map(is_intercepted, stock.transformers[0].modules()))


def test_our_pipeline_modules_import_no_diffusers_until_asked():
    lines = (
        "import sys, dit_sparse",
        *(f"import dit_sparse.pipelines.{family} as {family}" for family in FAMILIES),
        "assert not hasattr(wan, 'NoSuchPipeline')",
        "assert 'diffusers' not in sys.modules",
        "from dit_sparse.pipelines.wan import WanPipeline",
        "assert 'diffusers' in sys.modules",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


# --- bad input


class Pipe:
    def __init__(self, **components):
        self.components = components


BAD = {
    "unknown method": (dict(method="radiall"), "there is no method 'radiall'"),
    "no method": (dict(method=3), "a method is a name or a dit_sparse.Method, not int"),
    "unknown setting": (dict(decaay=1.0), "radial has no setting 'decaay'"),
    "setting of a Method": (dict(method=ds.METHODS["radial"](), decay=1.0), "'decay'"),
    "setting out of range": (dict(method="window", size=2.0), "size"),
    "density 0": (dict(density=0.0), "above 0 and at most 1, not 0.0"),
    "density 2": (dict(density=2), "above 0 and at most 1, not 2"),
    "density -1": (dict(density=-1), "above 0 and at most 1, not -1"),
    "density nan": (dict(density=float("nan")), "above 0 and at most 1, not nan"),
    "density 2 of a Method": (dict(method=ds.METHODS["radial"](), density=2), "above 0 and at most 1, not 2"),
    "dense_steps 1.5": (dict(dense_steps=1.5), "dense_steps is a count"),
    "dense_steps -1": (dict(dense_steps=-1), "dense_steps is a count"),
    "dense_layers 1.5": (dict(dense_layers=1.5), "dense_layers is a count"),
    "unknown executor": (dict(executor="gatherer"), "there is no executor 'gatherer'"),
    "block 20": (dict(block=20), "block is a multiple of 16 from 16 to 256 tokens, not 20"),
    "block 0": (dict(block=0), "block is a multiple of 16 from 16 to 256 tokens, not 0"),
    "block 512": (dict(block=512), "block is a multiple of 16 from 16 to 256 tokens, not 512"),
}


@pytest.mark.parametrize("settings, message", BAD.values(), ids=BAD)
def test_bad_settings_are_refused_in_one_sentence(wan, settings, message):
    before, attributes = trace(wan), set(vars(wan.pipe))
    assert_one_sentence(lambda: ds.enable(wan.pipe, **settings), message)
    assert_same_objects(trace(wan), before)
    assert set(vars(wan.pipe)) == attributes


MODELS = {
    "no transformer": (lambda: Pipe(), "Pipe has no transformer to make sparse"),
    "transformer None": (lambda: Pipe(transformer=None, vae=torch.nn.Linear(1, 1)), "Pipe has no transformer"),
    "unknown transformer": (lambda: Pipe(transformer=torch.nn.Linear(1, 1)), "no family .* knows Linear"),
    "unknown bare transformer": (lambda: torch.nn.Linear(1, 1), "no family .* knows Linear"),
    "no module": (lambda: "wan", "str has no transformer"),
}


@pytest.mark.parametrize("model, message", MODELS.values(), ids=MODELS)
def test_models_nobody_knows_are_refused_in_one_sentence(model, message):
    model = model()
    before = dict(vars(model)) if hasattr(model, "__dict__") else {}
    for enable in (ds.enable, ds.SparseAttnProcessor().attach):
        assert_one_sentence(lambda enable=enable: enable(model), message)
    assert before == (dict(vars(model)) if hasattr(model, "__dict__") else {})


def test_one_unknown_transformer_leaves_the_known_one_alone(wan):
    pipe = Pipe(transformer=wan.pipe.transformer, transformer_2=torch.nn.Linear(1, 1))
    before = trace(wan)
    assert_one_sentence(lambda: ds.enable(pipe), "no family .* knows Linear")
    assert_same_objects(trace(wan), before)


def assert_one_sentence(call, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    text = str(error.value)
    assert len(text) < 240 and "\n" not in text and not re.search(r"\. [A-Z]", text), text


# --- a bare transformer


def test_a_fraction_of_unknown_steps_is_refused_at_the_first_call():
    stock = built("ltx")
    before = trace(stock)
    with sparse(stock.pipe.transformer, dense_steps=0.25):
        assert_one_sentence(lambda: latents(stock), "the number of steps is unknown")
        assert_one_sentence(lambda: latents(stock), "the number of steps is unknown")
    assert_same_objects(trace(stock), before)
    assert latents(stock).equal(dense_latents("ltx"))


@pytest.mark.parametrize("settings", [dict(dense_steps=1), dict(dense_steps=0.25, steps=STEPS)], ids=["count", "steps"])
def test_a_bare_transformer_is_as_good_as_its_pipeline(stock, settings):
    if len(stock.transformers) > 1:
        pytest.skip("two transformers share a clock only in their pipeline")
    expected = sparse_latents(stock, dense_steps=1)
    with sparse(stock.pipe.transformer, density=0.3, **settings) as run:
        assert latents(stock).equal(expected)
        assert latents(stock).equal(expected)
    assert run.report().dense_calls == {"the schedule": 2 * calls_per_step(stock)}
