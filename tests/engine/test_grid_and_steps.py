"""The site of every call: token grid, step, layer and branch, in all pipelines of the families."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from PIL import Image

import tiny_pipelines as tiny
from dit_sparse.engine.tracking import StepTracker
from sparse_pipelines import (
    STEPS,
    VARIANTS,
    RunningMean,
    assert_near,
    assert_same_objects,
    attributes_of,
    cached_pipeline,
    calls_per_step,
    count_layers,
    enable_sparse,
    expected_grids,
    for_pipelines,
    generate,
    generate_dense,
    generate_sparse,
    make_variant,
    recorded_sites,
)


def test_every_site_occurs_once(stock):
    recorded = recorded_sites(stock)
    branches = {
        "wan": ["cond", "uncond"], "hunyuan_video": ["cond"], "cogvideox": ["cond_uncond"], "mochi": ["cond_uncond"],
        "ltx": ["cond_uncond"],
    }  # fmt: skip
    names = next(names for family, names in branches.items() if stock.name.startswith(family))
    parts = ["transformer"] * 2 + ["transformer_2" if stock.name == "wan22" else "transformer"] * 2
    expected = Counter(
        (grid, step, layer, f"{parts[step]} {name} {call}")
        for call, grid in enumerate(expected_grids(stock))
        for step in range(STEPS)
        for layer in range(count_layers(stock))
        for name in names
    )
    assert Counter((site.grid, site.step, site.layer, site.branch) for site in recorded) == expected
    assert {(site.steps, site.layers, site.block) for site in recorded} == {(STEPS, count_layers(stock), 16)}


def test_guidance_in_two_calls_has_two_branches():
    recorded = recorded_sites(cached_pipeline("hunyuan_video"), other=dict(true_cfg_scale=4.0))
    branches = [(site.step, site.branch) for site in recorded if site.layer == 0]
    assert branches == [(step, f"transformer {name} 0") for step in range(STEPS) for name in ("cond", "uncond")]


def test_second_generation_starts_at_step_0(stock):
    first, second = recorded_sites(stock), []
    with enable_sparse(stock, density=0.3, dense_steps=0) as run:
        generate(stock)
        run.observe(lambda site, q, k, plan: second.append(site))
        generate(stock)
    assert first == second


def test_branches_without_cache_context_are_numbered():
    recorded = recorded_sites(make_variant("WanVideoToVideoPipeline"))
    branches = [(site.step, site.layer, site.branch) for site in recorded]
    assert branches == [(s, n, f"transformer call {c} 0") for s in range(3) for c in (0, 1) for n in range(2)]


def test_scheduler_can_be_replaced_during_a_run():
    stock = tiny.ALL["hunyuan_video"]()
    with enable_sparse(stock, density=0.3) as run:
        stock.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        generate(stock, num_inference_steps=6)
    assert run.report().sparse_calls == 5 * calls_per_step(stock)


@pytest.mark.parametrize("name", VARIANTS)
def test_other_pipelines_of_a_family(name):
    stock, recorded = make_variant(name), []
    assert type(stock.pipe).__name__ == name and isinstance(stock.pipe, getattr(diffusers, name))
    plain = generate(stock)
    with enable_sparse(stock, density=1.0) as run:
        run.observe(lambda site, q, k, plan: recorded.append(site))
        torch.testing.assert_close(generate(stock), plain, rtol=0, atol=2e-5)
    steps = 3 if "VideoToVideo" in name else 4  # strength 0.75 skips one of four steps
    assert {(site.step, site.steps) for site in recorded} == {(step, steps) for step in range(1, steps)}
    frames = 6 if name == "LTXConditionPipeline" else 5  # the keyframe is a frame before the video
    assert {(site.grid.frames, site.grid.height, site.grid.width) for site in recorded} == {(frames, 5, 7)}
    assert not generate(stock).equal(generate_sparse(stock))


def test_reference_frames_are_part_of_the_grid():
    stock = cached_pipeline("wan_vace")
    other = dict(reference_images=[Image.linear_gradient("L").resize((112, 80)).convert("RGB")])
    plain = generate(stock, **other)
    with enable_sparse(stock, density=1.0) as run:
        torch.testing.assert_close(generate(stock, **other), plain, rtol=0, atol=2e-5)
    assert run.report().grids == ["6x5x7"] and run.report().sparse_calls == 3 * calls_per_step(stock)


def test_second_transformer_continues_the_steps():
    stock = cached_pipeline("wan22")
    components = {(site.step, site.branch.split()[0]) for site in recorded_sites(stock)}
    assert components == {(0, "transformer"), (1, "transformer"), (2, "transformer_2"), (3, "transformer_2")}
    with enable_sparse(stock, density=0.3, dense_steps=3) as run:
        generate(stock)
    assert run.report().dense_calls == {"the schedule": 3 * calls_per_step(stock)}


@pytest.mark.parametrize("missing, ratio", [("transformer", 2.0), ("transformer_2", None)])
def test_one_of_two_transformers_can_be_missing(missing, ratio):
    stock = cached_pipeline("wan22")
    pipe = WanPipeline(**stock.pipe.components | {missing: None}, boundary_ratio=ratio)
    pipe.set_progress_bar_config(disable=True)
    other = dict(guidance_scale_2=None)
    stock = replace(stock, pipe=pipe)
    plain, before = generate(stock, **other), attributes_of(stock)
    present = "transformer_2" if missing == "transformer" else "transformer"
    recorded = recorded_sites(stock, other=other)
    assert {site.branch for site in recorded} == {f"{present} cond 0", f"{present} uncond 0"}
    assert {site.step for site in recorded} == set(range(STEPS))
    assert_near(generate_sparse(stock, density=1.0, other=other), plain)
    assert_same_objects(attributes_of(stock), before)


@for_pipelines("wan", "wan22", "hunyuan_video", "cogvideox", "cogvideox15", "mochi", "ltx")
def test_another_video_size_gets_new_plans(stock):
    other = dict(num_frames=stock.kwargs()["num_frames"] - 2 * stock.strides[0], height=192, width=128)
    plain = generate_dense(stock.name), generate(stock, **other)
    for method, density, expected in [
        ("radial", 1.0, plain),
        ("window", 0.3, [generate_sparse(stock, "window", other=change) for change in ({}, other)]),
        (RunningMean(), 0.3, [generate_sparse(stock, RunningMean(), other=change) for change in ({}, other)]),
    ]:
        with enable_sparse(stock, method, density=density) as run:
            for change, out in [({}, expected[0]), (other, expected[1]), ({}, expected[0])]:
                assert_near(generate(stock, **change), out)
        shapes = {"x".join(map(str, grid)) for grid in (stock.grid, stock.grid_for(**other))}
        assert len(shapes) == 2
        assert {
            word for grid in run.report().grids for word in grid.split() if "x" in word and word != "text"
        } == shapes


@pytest.mark.parametrize("shift", [1.0, 1.73])
def test_timesteps_divided_by_1000_are_not_looked_up_in_the_schedule(shift):
    """The last timestep of a schedule can be 1, like the first one that such a model gets."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(5)
    tracker = StepTracker(lambda: SimpleNamespace(timesteps=scheduler.timesteps), lambda: False, None, lambda: None)
    steps, latents = [], torch.zeros(1, 4)
    for timestep in scheduler.timesteps:
        tracker.begin_forward(timestep / 1000, latents, None)
        tracker.end_forward()
        steps.append(tracker.step)
    assert steps == list(range(5)) and tracker.steps == 5
