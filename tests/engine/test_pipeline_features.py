"""Features of diffusers' pipelines together with sparse attention; those of transformers are in tests/families."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanVideoToVideoPipeline

import tiny_pipelines as tiny
from sparse_pipelines import VIDEO, assert_near, cached_pipeline, calls_per_step, enable_sparse, generate


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox"])
def test_callback_that_changes_the_latents(name):
    stock = cached_pipeline(name)

    def brighten(pipe, step, timestep, values):
        return {"latents": values["latents"] * 1.1}

    expected = generate(stock, callback_on_step_end=brighten)
    with enable_sparse(stock, density=1.0) as run:
        assert_near(generate(stock, callback_on_step_end=brighten), expected)
    assert run.report().sparse_calls == 3 * calls_per_step(stock)


@pytest.mark.parametrize("first", ["from_pipe", "sparse attention"])
def test_pipeline_from_another_one_shares_the_run(first):
    """It shares the transformer; `disable` restores it for both."""
    stock = tiny.ALL["wan"]()
    call = {key: value for key, value in stock.kwargs().items() if key != "num_frames"} | dict(
        video=VIDEO, strength=0.75
    )
    make = lambda: WanVideoToVideoPipeline.from_pipe(stock.pipe, torch_dtype=torch.float32)
    compute = lambda pipe: pipe(**call | dict(generator=torch.Generator().manual_seed(0)), output_type="latent").frames
    expected = compute(make())
    other = make() if first == "from_pipe" else None
    with enable_sparse(stock, density=1.0, dense_steps=0) as run:
        other = other or make()
        other.set_progress_bar_config(disable=True)
        assert_near(compute(other), expected)
    assert run.report().sparse_calls > 0 and not run.report().dense_calls
    assert compute(other).equal(expected)


def test_tiled_decoding():
    stock = tiny.ALL["wan"]()
    stock.pipe.vae.enable_tiling()
    decode = lambda: torch.from_numpy(stock.pipe(**stock.kwargs(), output_type="np").frames)
    expected = decode()
    with enable_sparse(stock, density=1.0) as run:
        assert_near(decode(), expected, 1e-4)
    assert run.report().sparse_calls == 3 * calls_per_step(stock)
