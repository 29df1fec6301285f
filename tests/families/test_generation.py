"""Stock pipelines of new families generate with sparse attention: their own arguments, steps and guidance."""

from __future__ import annotations

import diffusers
import pytest
import torch

import dit_sparse as ds
from tiny_models import Call, tiny_model, tiny_models

SETTINGS = dict(min_tokens=0, block=16, executor="reference")
STEPS = 3


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def flow(**config) -> diffusers.SchedulerMixin:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def prompts(masks: bool = False, pooled: bool = False) -> dict:
    """Return embeddings of a prompt and of a negative prompt, with their masks."""
    call = dict(prompt_embeds=noise(1, 20, 16), negative_prompt_embeds=noise(1, 20, 16) * 0.5)
    if masks:
        mask = torch.ones(1, 20, dtype=torch.long)
        call |= dict(prompt_attention_mask=mask, negative_prompt_attention_mask=mask)
    if pooled:
        call |= dict(pooled_prompt_embeds=noise(1, 8), negative_pooled_prompt_embeds=noise(1, 8) * 0.5)
    return call


def one_prompt(**more) -> dict:
    return dict(prompt_embeds=noise(1, 20, 16), **more)


MAGVIT = dict(latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2)
WAN_VAE = dict(base_dim=4, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
VIDEO = dict(num_frames=9, height=128, width=128)
IMAGE = dict(height=192, width=256)
PIPELINES = {  # transformer, other components, arguments of the call, transformer calls in a step
    "FluxPipeline": ("FluxTransformer2DModel", {}, lambda: one_prompt(pooled_prompt_embeds=noise(1, 8), **IMAGE), 1),
    "Flux2Pipeline": ("Flux2Transformer2DModel", {}, lambda: one_prompt(**IMAGE), 1),
    "StableDiffusion3Pipeline": ("SD3Transformer2DModel", {}, lambda: prompts(pooled=True) | IMAGE, 1),
    "QwenImagePipeline": (
        "QwenImageTransformer2DModel",
        {},
        lambda: one_prompt(prompt_embeds_mask=torch.ones(1, 20, dtype=torch.long), **IMAGE),
        1,
    ),
    "CogView4Pipeline": ("CogView4Transformer2DModel", {}, lambda: prompts() | IMAGE, 2),
    "Lumina2Pipeline": ("Lumina2Transformer2DModel", {}, lambda: prompts(masks=True) | IMAGE, 2),
    "ZImagePipeline": (
        "ZImageTransformer2DModel",
        {},
        lambda: dict(prompt_embeds=[noise(20, 16)], negative_prompt_embeds=[noise(20, 16) * 0.5], **IMAGE),
        1,
    ),
    "AuraFlowPipeline": (
        "AuraFlowTransformer2DModel",
        dict(scheduler=lambda: flow(shift=1.73)),
        lambda: prompts(masks=True) | IMAGE,
        1,
    ),
    "PixArtSigmaPipeline": (
        "PixArtTransformer2DModel",
        dict(scheduler=diffusers.DPMSolverMultistepScheduler),
        lambda: prompts(masks=True) | IMAGE | dict(negative_prompt=None, use_resolution_binning=False),
        1,
    ),
    "OvisImagePipeline": ("OvisImageTransformer2DModel", {}, lambda: prompts() | IMAGE | dict(negative_prompt=None), 2),
    "EasyAnimatePipeline": (
        "EasyAnimateTransformer3DModel",
        dict(vae=lambda: diffusers.AutoencoderKLMagvit(**MAGVIT)),
        lambda: prompts(masks=True) | VIDEO,
        1,
    ),
    "SkyReelsV2Pipeline": (
        "SkyReelsV2Transformer3DModel",
        dict(
            vae=lambda: diffusers.AutoencoderKLWan(**WAN_VAE),
            scheduler=lambda: diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True
            ),
        ),
        lambda: prompts() | VIDEO,
        2,
    ),
}


def make_pipeline(name: str) -> diffusers.DiffusionPipeline:
    transformer, parts, *_ = PIPELINES[name]
    cls = getattr(diffusers, name)
    components = dict.fromkeys(cls._get_signature_keys(cls)[0]) | {"transformer": tiny_model(transformer)}
    components |= {part: make() for part, make in ({"scheduler": flow} | parts).items()}
    pipe = cls(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_generates_sparsely_and_is_restored(name):
    transformer, _, arguments, calls = PIPELINES[name]
    pipe, per_step = make_pipeline(name), tiny_models()[transformer].sites * calls

    def generate() -> torch.Tensor:
        options = dict(num_inference_steps=STEPS, output_type="latent", return_dict=False)
        return pipe(**arguments(), **options, generator=torch.Generator().manual_seed(0))[0]

    stock = generate()
    with ds.enable(pipe, "random_blocks", density=1.0, dense_steps=0, **SETTINGS):
        torch.testing.assert_close(generate(), stock, rtol=1e-3, atol=1e-5 * float(stock.abs().max()))
    with ds.enable(pipe, "random_blocks", density=0.5, dense_steps=1, **SETTINGS) as run:
        assert not torch.equal(generate(), stock)
    report = run.report()
    assert report.dense_calls == {"the schedule": per_step} and report.sparse_calls == per_step * (STEPS - 1)
    assert report.density_achieved == pytest.approx(0.5, abs=0.01)
    assert generate().equal(stock)


def test_the_mask_of_chroma_is_a_bias_and_stays_dense():
    """Its pipeline passes numbers, not truth values, which the model adds to the scores."""
    tiny, model = tiny_models()["ChromaTransformer2DModel"], tiny_model("ChromaTransformer2DModel")
    arguments = tiny.arguments(Call((1, 12, 16)))
    mask = (torch.arange(20 + 192) < 10) | (torch.arange(20 + 192) >= 20)
    with ds.enable(model, "random_blocks", density=0.5, dense_steps=0, **SETTINGS) as run:
        model(**arguments, attention_mask=mask[None].float())
    assert run.report().dense_calls == {"the attention mask adds a bias to the scores": 2}


@pytest.mark.parametrize(
    ("pipeline", "name"),
    [
        ("WanModularPipeline", "WanTransformer3DModel"),
        ("FluxModularPipeline", "FluxTransformer2DModel"),
        ("LTX2ModularPipeline", "LTX2VideoTransformer3DModel"),
        ("HunyuanVideo15ModularPipeline", "HunyuanVideo15Transformer3DModel"),
        ("MiniMaxH3ModularPipeline", "MiniMaxH3Transformer3DModel"),
    ],
)
def test_transformers_of_modular_pipelines_are_sparse(pipeline, name):
    pipe, tiny = getattr(diffusers, pipeline)(), tiny_models()[name]
    pipe.update_components(transformer=tiny_model(name))
    with ds.enable(pipe, "random_blocks", density=0.5, dense_steps=0, **SETTINGS) as run:
        pipe.transformer(**tiny.arguments(Call(tiny.grids[0])))
    assert run.report().sparse_calls == tiny.sites and not run.report().dense_calls and pipe.sparse_run is run
