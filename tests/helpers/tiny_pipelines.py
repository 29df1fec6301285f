"""Stock diffusers video pipelines with tiny random weights (CPU, float32, no text encoder)."""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

ALL: dict[str, Callable[..., "Tiny"]] = {}
SIZE = dict(num_attention_heads=2, attention_head_dim=32, num_layers=2)


@dataclass
class Tiny:
    """A pipeline, the arguments of one call, and what its self-attention should see during it.

    `kwargs(seed=0, lengths=..., **other)` returns fresh arguments for `pipe(**...)`; `lengths` holds the
    valid text tokens of each prompt and so sets the batch size. Batched CFG puts as many negatives first.
    """

    pipe: Any
    kwargs: Callable[..., dict]
    grid: tuple[int, int, int]  # frames, height, width of the video tokens for kwargs()
    strides: tuple[int, int, int]  # frames per latent frame, latent frames per token, pixels per token
    attn: str = r"^transformer_blocks\.\d+\.attn1$"  # names of the video self-attention modules
    text: int = 0  # text slots in the joint sequence
    side: str | None = None  # where they stand: "before" or "after" the video
    valid: tuple[int, ...] = ()  # valid ones in each batch row of a transformer call for kwargs()
    calls: int = 1  # transformer calls per step
    name: str = ""

    @property
    def transformers(self) -> list[torch.nn.Module]:
        """Transformers in order of use."""
        return [part for name, part in sorted(self.pipe.components.items()) if part and "transformer" in name]

    def grid_for(self, **other) -> tuple[int, int, int]:
        """Token grid for kwargs(**other), with other num_frames, height or width."""
        call, (temporal, patch, pixels) = self.kwargs(**other), self.strides
        frames = (call["num_frames"] - 1) // temporal + 1
        return -(-frames // patch), call["height"] // pixels, call["width"] // pixels


def _builder(make: Callable[..., Tiny]) -> Callable[..., Tiny]:
    """Register a builder in ALL and run it with a fixed seed; options go to the transformer's config."""

    @functools.wraps(make)
    def build(**config) -> Tiny:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tiny = make(**config)
        for part in tiny.pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False)
        for model in tiny.transformers:
            for name, module in model.named_modules():
                if re.search(tiny.attn, name):  # attend less evenly, and let it matter more to the output
                    module.norm_q.weight.mul_(2)
                    module.to_v.weight.mul_(4)
        tiny.pipe.set_progress_bar_config(disable=True)
        tiny.name = make.__name__
        return tiny

    ALL[make.__name__] = build
    return build


def _pipe(pipeline: str, **parts):
    """Assemble a pipeline that takes embeddings; parts may be given as (diffusers class name, arguments)."""
    import diffusers

    made = {k: getattr(diffusers, p[0])(**p[1]) if isinstance(p, tuple) else p for k, p in parts.items()}
    return getattr(diffusers, pipeline)(**{"text_encoder": None, "tokenizer": None} | made)


def _text(lengths: tuple[int, ...], slots: int, seed: int, dim: int = 32) -> tuple:
    """Random embeddings, also in the padding, and their mask."""
    embeds = torch.randn(len(lengths), slots, dim, generator=torch.Generator().manual_seed(seed))
    return embeds, torch.arange(slots) < torch.tensor(lengths)[:, None]


def _prompts(lengths: tuple[int, ...], slots: int, negative: int, masks=True, pooled: int = 0) -> dict:
    """Positive and negative embeddings with their masks, or without masks and with zeros as padding."""
    out = {}
    for sign, chosen, seed in (("", lengths, 1), ("negative_", (negative,) * len(lengths), 2)):
        embeds, mask = _text(chosen, slots, seed)
        out[f"{sign}prompt_embeds"] = embeds if masks else embeds * mask[..., None]
        if masks:
            out[f"{sign}prompt_attention_mask"] = mask
        if pooled:
            out[f"{sign}pooled_prompt_embeds"] = _text(chosen, 1, seed + 2, pooled)[0][:, 0]
    return out


def _arguments(shape: tuple[int, int, int], length: int, text: dict, **fixed) -> Callable[..., dict]:
    """Return a `kwargs` function: four steps, `shape` is frames and pixels, `text` goes to `_prompts`."""
    fixed |= dict(zip(("num_frames", "height", "width"), shape, strict=True), num_inference_steps=4)

    def kwargs(seed: int = 0, lengths: tuple[int, ...] = (length,), **other) -> dict:
        return dict(fixed, generator=torch.Generator().manual_seed(seed), **_prompts(lengths, **text)) | other

    return kwargs


def _wan(pipeline: str, config: dict, parts: dict, shift: float = 5.0, slots: int = 24, **fixed) -> Tiny:
    """Wan: video-only self-attention, cond and uncond in two calls, UniPC (integer timesteps)."""
    from PIL import Image

    config = SIZE | dict(text_dim=32, freq_dim=32, ffn_dim=64) | config
    vae = dict(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    if large := "expand_timesteps" in parts:  # Wan 2.2 5B
        config |= dict(in_channels=48, out_channels=48)
        vae |= dict(z_dim=48, latents_mean=[0.0] * 48, latents_std=[1.0] * 48, scale_factor_spatial=16)
        vae |= dict(is_residual=True, patch_size=2, in_channels=12, out_channels=12)
    transformer = (pipeline.replace("ImageToVideo", "").replace("Pipeline", "Transformer3DModel"), config)
    if "boundary_ratio" in parts:
        parts["transformer_2"] = transformer
    scheduler = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    parts = dict(scheduler=("UniPCMultistepScheduler", scheduler), vae=("AutoencoderKLWan", vae)) | parts
    pipe = _pipe(pipeline, transformer=transformer, **parts)
    shape = (17, 160, 224) if large else (17, 80, 112)
    if "Image" in pipeline:
        fixed["image"] = Image.radial_gradient("L").resize(shape[:0:-1]).convert("RGB")
    kwargs = _arguments(shape, 15, dict(slots=slots, negative=6, masks=False), **fixed)
    return Tiny(pipe, kwargs, (5, 5, 7), (4, 1, shape[1] // 5), r"^(vace_)?blocks\.\d+\.attn1$", calls=2)


@_builder
def wan(**config) -> Tiny:
    """Wan 2.1 text to video."""
    return _wan("WanPipeline", config, {}, 3.0)


@_builder
def wan_i2v(**config) -> Tiny:
    """Wan 2.1 image to video with a tiny CLIP; cross-attention counts 512 text tokens from the end."""
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    clip = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    clip = CLIPVisionModel(CLIPVisionConfig(**clip, image_size=32, patch_size=16))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    config = dict(in_channels=36, image_dim=16, added_kv_proj_dim=64) | config
    parts = dict(image_encoder=clip, image_processor=processor)
    return _wan("WanImageToVideoPipeline", config, parts, 3.0, slots=512)


@_builder
def wan_vace(**config) -> Tiny:
    """Wan VACE with Euler (float timesteps); each picture in `reference_images` adds a frame of tokens."""
    parts = dict(scheduler=("FlowMatchEulerDiscreteScheduler", dict(shift=5.0)))
    return _wan("WanVACEPipeline", dict(num_layers=3, vace_layers=[0, 2]) | config, parts)


@_builder
def wan22(**config) -> Tiny:
    """Wan 2.2 A14B: `transformer` runs steps 0 and 1, `transformer_2` steps 2 and 3."""
    return _wan("WanPipeline", config, dict(boundary_ratio=0.9), guidance_scale_2=3.0)


@_builder
def wan22_5b(**config) -> Tiny:
    """Wan 2.2 5B text to video: one timestep per token."""
    return _wan("WanPipeline", config, dict(expand_timesteps=True))


@_builder
def wan22_5b_i2v(**config) -> Tiny:
    """Wan 2.2 5B image to video: timestep 0 on the tokens of the first frame."""
    return _wan("WanImageToVideoPipeline", config, dict(expand_timesteps=True))


@_builder
def hunyuan_video(**config) -> Tiny:
    """HunyuanVideo: [video, text], padding masked; try lengths=(17, 9) and true_cfg_scale=4.0 (two calls)."""
    base = dict(num_single_layers=2, num_refiner_layers=1, in_channels=4, out_channels=4, text_embed_dim=32)
    base |= dict(pooled_projection_dim=16, rope_axes_dim=(8, 12, 12), guidance_embeds=True)
    vae = dict(latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4)
    pipe = _pipe(
        "HunyuanVideoPipeline",
        transformer=("HunyuanVideoTransformer3DModel", SIZE | base | config),
        vae=("AutoencoderKLHunyuanVideo", vae | dict(mid_block_add_attention=False)),
        scheduler=("FlowMatchEulerDiscreteScheduler", dict(shift=7.0)),
        **dict(text_encoder_2=None, tokenizer_2=None),
    )
    kwargs = _arguments((17, 80, 112), 17, dict(slots=24, negative=9, pooled=16))
    attn = r"^(single_)?transformer_blocks\.\d+\.attn$"
    return Tiny(pipe, kwargs, (5, 5, 7), (4, 1, 16), attn, text=24, side="after", valid=(17,))


def _cogvideox(scheduler: str, config: dict, shape: tuple, grid: tuple, patch: int | None) -> Tiny:
    """CogVideoX: [text, video], batched CFG, all text slots attended."""
    base = dict(in_channels=4, out_channels=4, time_embed_dim=16, text_embed_dim=32, max_text_seq_length=12)
    base |= dict(patch_size_t=patch, patch_bias=patch is None, use_rotary_positional_embeddings=True)
    vae = dict(latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2)
    noise = dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    pipe = _pipe(
        "CogVideoXPipeline",
        transformer=("CogVideoXTransformer3DModel", SIZE | base | config),
        vae=("AutoencoderKLCogVideoX", vae),
        scheduler=(scheduler, noise),
    )
    kwargs = _arguments(shape, 12, dict(slots=12, negative=12, masks=False))
    return Tiny(pipe, kwargs, grid, (4, patch or 1, 16), text=12, side="before", valid=(12, 12))


@_builder
def cogvideox(**config) -> Tiny:
    """CogVideoX 1.0 in the style of 5B (rotary), DDIM."""
    return _cogvideox("CogVideoXDDIMScheduler", config, (17, 80, 112), (5, 5, 7), None)


@_builder
def cogvideox15(**config) -> Tiny:
    """CogVideoX 1.5: two latent frames per token, so that 5 are padded to 6; stochastic DPM."""
    return _cogvideox("CogVideoXDPMScheduler", config, (17, 112, 144), (3, 7, 9), 2)


@_builder
def mochi(**config) -> Tiny:
    """Mochi: [video, text] without padding, one row at a time: 9 text tokens uncond, 14 cond."""
    base = dict(pooled_projection_dim=32, in_channels=12, text_embed_dim=32, time_embed_dim=16)
    vae = dict(encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4)
    pipe = _pipe(
        "MochiPipeline",
        transformer=("MochiTransformer3DModel", SIZE | base | config),
        vae=("AutoencoderKLMochi", vae | dict(layers_per_block=(1,) * 5)),
        scheduler=("FlowMatchEulerDiscreteScheduler", dict(invert_sigmas=True)),
    )
    torch.nn.init.normal_(pipe.transformer.pos_frequencies)  # zero, that is no RoPE, by default
    kwargs = _arguments((25, 80, 112), 14, dict(slots=16, negative=9))
    return Tiny(pipe, kwargs, (5, 5, 7), (6, 1, 16), text=16, side="after", valid=(9, 14))


@_builder
def ltx(**config) -> Tiny:
    """LTX: packed latents, video-only self-attention, masked cross-attention, batched CFG."""
    base = dict(in_channels=8, out_channels=8, cross_attention_dim=64, caption_channels=32)
    vae = dict(latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    vae |= dict(layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5)
    pipe = _pipe(
        "LTXPipeline",
        transformer=("LTXVideoTransformer3DModel", SIZE | base | config),
        vae=("AutoencoderKLLTXVideo", vae),
        scheduler=("FlowMatchEulerDiscreteScheduler", dict(use_dynamic_shifting=True, shift_terminal=0.1)),
    )
    kwargs = _arguments((33, 160, 224), 13, dict(slots=16, negative=5))
    return Tiny(pipe, kwargs, (5, 5, 7), (8, 1, 32))
