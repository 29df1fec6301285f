"""Tiny image transformers, one of each supported class."""

from __future__ import annotations

from math import prod

import torch

from tiny_models import HEADS, Call, TinyModel

FLUX = HEADS | dict(num_layers=1, num_single_layers=1, in_channels=4, joint_attention_dim=16, axes_dims_rope=(4, 6, 6))
GRIDS = dict(grids=((1, 12, 16), (1, 10, 13)))
IMAGE = dict(axes="BCHW", **GRIDS)
PACKED = dict(axes="BNC", **GRIDS)


def _flux(call: Call, axes: int = 3) -> dict:
    return dict(
        hidden_states=call.packed(4),
        encoder_hidden_states=call.text(),
        timestep=call.time / 1000,
        img_ids=call.ids(axes),
        txt_ids=torch.zeros(call.slots, axes),
    )


def _flux1(call: Call) -> dict:
    return _flux(call) | dict(pooled_projections=call.noise(8))


def _flux2(call: Call) -> dict:
    return _flux(call, 4) | dict(guidance=call.time)


def _flux3(call: Call) -> dict:
    return _flux(call, 4)


def _chroma(call: Call) -> dict:
    return _flux(call)


def _bria_fibo(call: Call) -> dict:
    return _flux(call) | dict(text_encoder_layers=[call.text(8), call.text(8)])


def _bria_fibo2(call: Call) -> dict:
    return dict(
        hidden_states=call.image(4), timestep=call.time / 1000, encoder_hidden_states=call.noise(2, call.slots, 16)
    )


def _qwen(call: Call) -> dict:
    return dict(
        hidden_states=call.packed(4),
        encoder_hidden_states=call.text(),
        encoder_hidden_states_mask=call.mask,
        timestep=call.time / 1000,
        img_shapes=[[call.grid]] * call.batch,
    )


def _krea2(call: Call) -> dict:
    return dict(
        hidden_states=call.packed(4),
        encoder_hidden_states=call.noise(call.slots, 2, 16),
        encoder_attention_mask=call.mask,
        timestep=call.time / 1000,
        position_ids=torch.cat([torch.zeros(call.slots, 3), call.ids()]),
    )


def _image(call: Call) -> dict:
    return dict(hidden_states=call.image(4), encoder_hidden_states=call.text(), timestep=call.time)


def _sd3(call: Call) -> dict:
    return _image(call) | dict(pooled_projections=call.noise(8))


def _lumina2(call: Call) -> dict:
    return _image(call) | dict(encoder_attention_mask=call.mask)


def _z_image(call: Call) -> dict:
    captions = [text[:length] for text, length in zip(call.text(), call.mask.sum(1).tolist(), strict=True)]
    return dict(x=list(call.image(4)[:, :, None]), t=call.time / 1000, cap_feats=captions)


def _cogview(call: Call) -> dict:
    sizes = {name: torch.tensor([[64.0, 64.0]]).expand(call.batch, 2) for name in ("original_size", "target_size")}
    return _image(call) | sizes | dict(crop_coords=torch.zeros(call.batch, 2))


def _glm(call: Call) -> dict:
    arguments, tokens = _cogview(call), call.grid[1] * call.grid[2]
    del arguments["original_size"]
    prior = torch.arange(call.batch * tokens).view(call.batch, tokens) % 16
    return arguments | dict(prior_token_id=prior, prior_token_drop=torch.zeros_like(prior, dtype=torch.bool))


def _hidream(call: Call) -> dict:
    return dict(
        hidden_states=call.image(4),
        timesteps=call.time,
        encoder_hidden_states_t5=call.text(),
        encoder_hidden_states_llama3=call.noise(2, call.slots, 16).transpose(0, 1),
        pooled_embeds=call.noise(8),
    )


def _hunyuan_image(call: Call) -> dict:
    return _image(call) | dict(hidden_states=call.image(4, 1), encoder_attention_mask=call.mask)


def _ernie(call: Call) -> dict:
    return dict(hidden_states=call.image(4), timestep=call.time, text_bth=call.text(), text_lens=call.mask.sum(1))


def _pixart(call: Call) -> dict:
    return _image(call) | dict(added_cond_kwargs=dict(resolution=None, aspect_ratio=None))


def _hunyuan_dit(call: Call) -> dict:
    return _image(call) | dict(
        text_embedding_mask=call.mask,
        encoder_hidden_states_t5=call.text(),
        text_embedding_mask_t5=call.mask,
        image_meta_size=torch.ones(call.batch, 6),
        style=torch.zeros(call.batch, dtype=torch.long),
        image_rotary_emb=[torch.ones(call.grid[1] * call.grid[2], 16)] * 2,
    )


def _joyimage(call: Call) -> dict:
    return _image(call) | dict(hidden_states=call.video(4))


def _joyimage_plus(call: Call) -> dict:
    frames, height, width = call.grid
    return dict(
        hidden_states=call.noise(frames * height * width, 4, 1, 2, 2),
        timestep=call.time,
        encoder_hidden_states=call.text(),
        encoder_hidden_states_mask=call.mask.float(),
        shape_list=[[(1, height, width)] * frames] * call.batch,
    )


JOY = dict(in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=16, num_layers=2, rope_dim_list=[4, 6, 6])
COGVIEW = HEADS | dict(num_layers=2, in_channels=4, out_channels=4, text_embed_dim=16, time_embed_dim=8)
COGVIEW |= dict(condition_dim=4)

IMAGE_MODELS = [
    TinyModel("FluxTransformer2DModel", FLUX | dict(pooled_projection_dim=8), _flux1, 2, side="before", **PACKED),
    TinyModel(
        "Flux2Transformer2DModel",
        FLUX | dict(axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=16),
        _flux2,
        2,
        side="before",
        **PACKED,
    ),
    TinyModel(
        "Flux3Transformer2DModel",
        FLUX | dict(axes_dims_rope=(4, 4, 4, 4), timestep_channels=16, cond_in_channels=4),
        _flux3,
        2,
        side="before",
        **PACKED,
    ),
    TinyModel(
        "ChromaTransformer2DModel",
        FLUX | dict(approximator_num_channels=8, approximator_hidden_dim=8, approximator_layers=1),
        _chroma,
        2,
        side="before",
        **PACKED,
    ),
    TinyModel("BriaTransformer2DModel", FLUX, _flux, 2, side="before", **PACKED),
    TinyModel("BriaFiboTransformer2DModel", FLUX | dict(text_encoder_dim=8), _bria_fibo, 2, side="before", **PACKED),
    TinyModel(
        "LongCatImageTransformer2DModel", FLUX | dict(pooled_projection_dim=8), _flux, 2, side="before", **PACKED
    ),
    TinyModel(
        "BriaFibo2Transformer2DModel",
        dict(in_channels=4, dim=32, n_layers=2, n_refiner_layers=0, n_heads=2, cap_feat_dim=16, axes_dims=(4, 6, 6))
        | dict(injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=16, max_num_gist_tokens=32)
        | dict(gist_step=16, gist_min_text_len=16, gist_max_text_len=64, axes_lens=(64, 64, 64)),
        _bria_fibo2,
        2,
        side="before",
        text_tokens=lambda slots: 32,
        **IMAGE,
    ),
    TinyModel("OvisImageTransformer2DModel", FLUX | dict(out_channels=4), _flux, 2, side="before", **PACKED),
    TinyModel(
        "QwenImageTransformer2DModel",
        HEADS
        | dict(num_layers=2, in_channels=4, out_channels=4, joint_attention_dim=16, axes_dims_rope=(4, 6, 6))
        | dict(patch_size=1),
        _qwen,
        2,
        side="before",
        masked=True,
        **PACKED,
    ),
    TinyModel(
        "Krea2Transformer2DModel",
        HEADS
        | dict(num_layers=2, in_channels=4, num_key_value_heads=1, intermediate_size=32, timestep_embed_dim=8)
        | dict(text_hidden_dim=16, num_text_layers=2, text_num_attention_heads=1, text_num_key_value_heads=1)
        | dict(text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1)
        | dict(axes_dims_rope=(4, 6, 6)),
        _krea2,
        2,
        side="before",
        masked=True,
        **PACKED,
    ),
    TinyModel(
        "SD3Transformer2DModel",
        HEADS
        | dict(num_layers=2, in_channels=4, out_channels=4, joint_attention_dim=16, caption_projection_dim=32)
        | dict(pooled_projection_dim=8, sample_size=64, pos_embed_max_size=64, dual_attention_layers=(0,)),
        _sd3,
        3,
        side="after",
        **IMAGE,
    ),
    TinyModel(
        "Lumina2Transformer2DModel",
        dict(in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=0, num_attention_heads=2, num_kv_heads=1)
        | dict(multiple_of=16, axes_dim_rope=(4, 6, 6), axes_lens=(64, 64, 64), cap_feat_dim=16),
        _lumina2,
        2,
        side="before",
        masked=True,
        **IMAGE,
    ),
    TinyModel(
        "ZImageTransformer2DModel",
        dict(in_channels=4, dim=32, n_layers=2, n_refiner_layers=0, n_heads=2, n_kv_heads=2, cap_feat_dim=16)
        | dict(axes_dims=[4, 6, 6], axes_lens=[256, 64, 64]),
        _z_image,
        2,
        axes="BCFHW",
        latents="x",
        grids=((1, 12, 16), (1, 14, 17)),
        side="after",
        text=("cap_feats",),
        text_tokens=lambda slots: slots + -slots % 32,
        references=lambda call: (0, -prod(call.grid) % 32),
        masked=True,
    ),
    TinyModel(
        "CogView3PlusTransformer2DModel",
        COGVIEW | dict(pos_embed_max_size=32, sample_size=32),
        _cogview,
        2,
        side="before",
        **IMAGE,
    ),
    TinyModel(
        "CogView4Transformer2DModel", COGVIEW | dict(rope_axes_dim=(32, 32)), _cogview, 2, side="before", **IMAGE
    ),
    TinyModel(
        "GlmImageTransformer2DModel",
        COGVIEW | dict(prior_vq_quantizer_codebook_size=16),
        _glm,
        2,
        side="before",
        **IMAGE,
    ),
    TinyModel(
        "HiDreamImageTransformer2DModel",
        HEADS
        | dict(num_layers=1, num_single_layers=1, in_channels=4, patch_size=2, caption_channels=[16, 16])
        | dict(text_emb_dim=8, axes_dims_rope=(4, 6, 6), max_resolution=(32, 32), llama_layers=[0, 1])
        | dict(num_routed_experts=2, num_activated_experts=1, force_inference_output=True),
        _hidream,
        2,
        side="after",
        text=("encoder_hidden_states_t5", "encoder_hidden_states_llama3"),
        text_tokens=lambda slots: 3 * slots,
        axes="BCHW",
        grids=((1, 15, 15), (1, 12, 16)),  # if it is not square, padded to the maximal size
        references=lambda call: (0, 0 if call.grid[1] == call.grid[2] else 256 - prod(call.grid)),
    ),
    TinyModel(
        "HunyuanImageTransformer2DModel",
        HEADS
        | dict(num_layers=1, num_single_layers=1, num_refiner_layers=1, in_channels=4, out_channels=4)
        | dict(text_embed_dim=16, rope_axes_dim=(8, 8)),
        _hunyuan_image,
        2,
        patch=(1, 1, 1),
        side="after",
        masked=True,
        **IMAGE,
    ),
    TinyModel(
        "ErnieImageTransformer2DModel",
        dict(hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=64, in_channels=4, out_channels=4)
        | dict(patch_size=2, text_in_dim=16, rope_axes_dim=(4, 6, 6)),
        _ernie,
        2,
        side="after",
        text=("text_bth",),
        masked=True,
        **IMAGE,
    ),
    TinyModel(
        "AuraFlowTransformer2DModel",
        HEADS
        | dict(sample_size=32, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, joint_attention_dim=16)
        | dict(caption_projection_dim=32, pos_embed_max_size=1024),
        _image,
        2,
        side="before",
        references=lambda call: (8, 0),
        **IMAGE,
    ),
    TinyModel(
        "PixArtTransformer2DModel",
        HEADS
        | dict(in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=32, sample_size=32)
        | dict(caption_channels=16, use_additional_conditions=False),
        _pixart,
        2,
        **IMAGE,
    ),
    TinyModel(
        "HunyuanDiT2DModel",
        HEADS
        | dict(in_channels=4, patch_size=2, sample_size=32, hidden_size=32, num_layers=2, cross_attention_dim=16)
        | dict(cross_attention_dim_t5=16, pooled_projection_dim=8, text_len=20, text_len_t5=20),
        _hunyuan_dit,
        2,
        **IMAGE,
    ),
    TinyModel("JoyImageEditTransformer3DModel", JOY, _joyimage, 2, side="after"),
    TinyModel("JoyImageEditPlusTransformer3DModel", JOY, _joyimage_plus, 2, axes="BNC", side="after", masked=True),
]
