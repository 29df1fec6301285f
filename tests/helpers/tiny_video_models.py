"""Tiny video transformers, one of each supported class."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, prod

import torch

from tiny_models import HEADS, Call, TinyModel

TEXT_AFTER = dict(side="after", masked=True)
WAN = HEADS | dict(num_layers=2, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32)
COGVIDEOX = HEADS | dict(num_layers=2, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16)
COGVIDEOX |= dict(max_text_seq_length=20, use_rotary_positional_embeddings=True)
LTX = HEADS | dict(num_layers=2, in_channels=4, out_channels=4, cross_attention_dim=32, caption_channels=16)
HUNYUAN = HEADS | dict(num_layers=1, num_single_layers=1, in_channels=4, out_channels=4, text_embed_dim=16)
HUNYUAN15 = HEADS | dict(num_layers=2, num_refiner_layers=1, in_channels=4, out_channels=4, rope_axes_dim=(4, 6, 6))
HUNYUAN15 |= dict(text_embed_dim=16, text_embed_2_dim=8, image_embed_dim=8)
KANDINSKY = dict(in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, model_dim=32)
KANDINSKY |= dict(ff_dim=64, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6))


def _wan(call: Call) -> dict:
    return dict(hidden_states=call.video(4), timestep=call.time, encoder_hidden_states=call.text())


def _wan_vace(call: Call) -> dict:
    return _wan(call) | dict(control_hidden_states=call.video(8))


def _wan_animate(call: Call) -> dict:
    frames, *_ = call.grid
    return _wan(call) | dict(
        hidden_states=call.video(12),
        encoder_hidden_states_image=call.noise(21, 4),
        pose_hidden_states=call.video(4)[:, :, 1:],
        face_pixel_values=call.noise(3, 4 * frames - 7, 16, 16),
    )


def _anyflow(call: Call) -> dict:
    time = call.time[:, None].expand(-1, call.grid[0])
    return _wan(call) | dict(hidden_states=call.video(4).transpose(1, 2), timestep=time, r_timestep=time - 100)


def _anyflow_far(call: Call) -> dict:
    """All frames as one chunk, which the model pads to a multiple of 128 tokens."""
    return _anyflow(call) | dict(chunk_partition=[call.grid[0]])


def _cosmos3(call: Call) -> dict:
    """A packed sequence: 20 text tokens, the video and 9 sound tokens."""
    tokens, text, sound = prod(call.grid), call.slots, 9
    position = torch.arange(text + tokens + sound)
    grid = call.ids().long().T + text
    return dict(
        input_ids=torch.arange(text),
        text_indexes=position[:text],
        position_ids=torch.cat([position[:text].expand(3, -1), grid, position[text + tokens :].expand(3, -1)], 1),
        und_len=text,
        sequence_length=len(position),
        vision_tokens=[call.video(4)],
        vision_token_shapes=[call.grid],
        vision_sequence_indexes=position[text : text + tokens],
        vision_mse_loss_indexes=position[text : text + tokens],
        vision_timesteps=torch.full((tokens,), 500.0),
        vision_noisy_frame_indexes=[torch.arange(call.grid[0])],
        sound_tokens=[call.noise(8, sound)[0]],
        sound_token_shapes=[(sound, 1, 1)],
        sound_sequence_indexes=position[text + tokens :],
        sound_mse_loss_indexes=position[text + tokens :],
        sound_timesteps=torch.full((sound,), 500.0),
        sound_noisy_frame_indexes=[torch.arange(sound)],
    )


def _hunyuan(call: Call) -> dict:
    return dict(
        hidden_states=call.video(4),
        timestep=call.time,
        encoder_hidden_states=call.text(),
        encoder_attention_mask=call.mask,
        pooled_projections=call.noise(8),
        guidance=call.time,
    )


def _hunyuan15(call: Call) -> dict:
    return dict(
        hidden_states=call.video(4, (1, 1, 1)),
        timestep=call.time,
        encoder_hidden_states=call.text(),
        encoder_attention_mask=call.mask,
        encoder_hidden_states_2=call.noise(6, 8),
        encoder_attention_mask_2=torch.arange(6).expand(call.batch, -1) < 4,
        image_embeds=torch.zeros(call.batch, 3, 8),
    )


def _framepack(call: Call) -> dict:
    history = _history(call, latents_clean=2, latents_history_2x=2, latents_history_4x=5)
    history |= {name: indices[0] for name, indices in history.items() if name.startswith("indices")}
    return _hunyuan(call) | history | dict(image_embeds=call.noise(3, 8), indices_latents=torch.arange(call.grid[0]))


def _helios(call: Call) -> dict:
    history = _history(call, latents_history_short=2, latents_history_mid=2, latents_history_long=5)
    return _wan(call) | history | dict(indices_hidden_states=torch.arange(call.grid[0]).expand(call.batch, -1))


def _history(call: Call, **frames: int) -> dict:
    """Return latents and frame indices of histories with these names and frames."""
    latents = {name: replace(call, grid=(count, *call.grid[1:])).video(4) for name, count in frames.items()}
    indices = {f"indices_{name}": torch.arange(count).expand(call.batch, -1) for name, count in frames.items()}
    return latents | indices


def _minimax_h3(call: Call) -> dict:
    """Return text, one conditioning frame, 9 audio tokens, and the video."""
    frame, video = call.grid[1] * call.grid[2], prod(call.grid)
    start = call.slots + frame + 9
    positions = torch.zeros(start + video, 3, dtype=torch.float64)
    positions[: call.slots, 0] = torch.arange(call.slots)
    positions[start:] = call.ids() + torch.tensor([float(call.slots), 0, 0])
    rows = torch.arange(start + video)
    tags = torch.where(rows < call.slots, 0, 2)
    tags[start - 9 : start] = 1
    return dict(
        hidden_states=call.noise(frame + video, 4 * 4),
        audio_hidden_states=call.noise(9, 4),
        encoder_hidden_states=call.text(),
        timestep=torch.tensor([500.0]),
        timestep_indices=torch.zeros(start + video, dtype=torch.long),
        token_tags=tags,
        position_ids=positions,
        video_indices=torch.cat([rows[call.slots : call.slots + frame], rows[start:]]),
        audio_indices=rows[start - 9 : start],
        text_indices=rows[: call.slots],
    )


def _cogvideox(call: Call) -> dict:
    return _wan(call) | dict(hidden_states=call.video(4).transpose(1, 2))


def _mochi(call: Call) -> dict:
    return _wan(call) | dict(hidden_states=call.video(12), encoder_attention_mask=call.mask)


def _ltx(call: Call) -> dict:
    sizes = dict(zip(("num_frames", "height", "width"), call.grid, strict=True))
    return dict(
        hidden_states=call.packed(4),
        encoder_hidden_states=call.text(),
        timestep=call.time,
        encoder_attention_mask=call.mask.long(),
        **sizes,
    )


def _ltx2(call: Call) -> dict:
    return _ltx(call) | dict(
        audio_hidden_states=call.noise(9, 4),
        audio_encoder_hidden_states=call.text(),
        audio_encoder_attention_mask=call.mask.long(),
        audio_num_frames=9,
        fps=25.0,
    )


def _sana_wm_refiner(call: Call) -> dict:
    from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMLTX2AudioVideoRotaryPosEmbed

    rope = SanaWMLTX2AudioVideoRotaryPosEmbed(32)  # channels of all heads
    return dict(
        hidden_states=call.packed(4),
        encoder_hidden_states=call.text(),
        timestep=call.time[:, None].expand(-1, prod(call.grid)),
        video_rotary_emb=rope(rope.prepare_video_coords(call.batch, *call.grid, device="cpu")),
        encoder_attention_mask=call.mask.long(),
    )


def _cosmos(call: Call) -> dict:
    return _wan(call) | dict(fps=24)


def _motif(call: Call) -> dict:
    return _wan(call) | dict(encoder_attention_mask=call.mask)


def _kandinsky5(call: Call) -> dict:
    return dict(
        hidden_states=call.video(4).permute(0, 2, 3, 4, 1),
        encoder_hidden_states=call.text(),
        timestep=call.time,
        pooled_projections=call.noise(8),
        visual_rope_pos=[torch.arange(size) for size in call.grid],
        text_rope_pos=torch.arange(call.slots),
    )


def _kandinsky6(call: Call) -> dict:
    arguments = _kandinsky5(call)
    positions = tuple(arguments.pop("visual_rope_pos"))
    arguments.pop("text_rope_pos")
    return arguments | dict(visual_rope_pos=positions, audio_hidden_states=call.noise(9, 4))


ANIMATE = dict(in_channels=12, latent_channels=4, image_dim=4, motion_encoder_size=16, motion_style_dim=8)
ANIMATE |= dict(motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16}, motion_dim=4, motion_encoder_dim=16)
ANIMATE |= dict(face_encoder_hidden_dim=16, face_encoder_num_heads=2, inject_face_latents_blocks=2)
LTX2 = dict(audio_num_attention_heads=2, audio_attention_head_dim=8, audio_in_channels=4, audio_out_channels=4)
LTX2 |= dict(audio_cross_attention_dim=16)


def _history_tokens(call: Call) -> tuple[int, int]:
    """Return the tokens of two frames, two frames at half scale and five at quarter scale."""
    histories = (((frames, *call.grid[1:]), scale) for frames, scale in ((2, 1), (2, 2), (5, 4)))
    return sum(prod(ceil(side / scale) for side in sides) for sides, scale in histories), 0


VIDEO_MODELS = [
    TinyModel("WanTransformer3DModel", WAN, _wan, 2),
    TinyModel("WanVACETransformer3DModel", WAN | dict(vace_layers=[0], vace_in_channels=8), _wan_vace, 3),
    TinyModel("WanAnimateTransformer3DModel", WAN | ANIMATE, _wan_animate, 2),
    TinyModel("ChronoEditTransformer3DModel", WAN, _wan, 2),
    TinyModel("SkyReelsV2Transformer3DModel", WAN, _wan, 2),
    TinyModel("AnyFlowTransformer3DModel", WAN, _anyflow, 2, axes="BFCHW"),
    TinyModel("AnyFlowFARTransformer3DModel", WAN, _anyflow_far, 2, axes="BFCHW"),
    TinyModel(
        "HunyuanVideoTransformer3DModel",
        HUNYUAN | dict(num_refiner_layers=1, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6)),
        _hunyuan,
        2,
        **TEXT_AFTER,
    ),
    TinyModel(
        "HunyuanVideo15Transformer3DModel",
        HUNYUAN15,
        _hunyuan15,
        2,
        patch=(1, 1, 1),
        **TEXT_AFTER,
        text_tokens=lambda slots: slots + 6 + 3,
    ),
    TinyModel(
        "HunyuanVideoFramepackTransformer3DModel",
        HUNYUAN
        | dict(num_refiner_layers=1, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6), image_proj_dim=8)
        | dict(has_image_proj=True, has_clean_x_embedder=True),
        _framepack,
        2,
        **TEXT_AFTER,
        text_tokens=lambda slots: slots + 3,
        references=_history_tokens,
    ),
    TinyModel(
        "HeliosTransformer3DModel",
        WAN | dict(rope_dim=(4, 6, 6), num_layers=2),
        _helios,
        2,
        references=_history_tokens,
    ),
    TinyModel(
        "MiniMaxH3Transformer3DModel",
        HEADS
        | dict(num_layers=2, num_refiner_layers=1, ffn_dim=32, in_channels=4, audio_in_channels=4, text_dim=16)
        | dict(hidden_size=32, freq_dim=16, time_embed_hidden_dim=32, time_embed_dim=16, rope_freq_dim=2),
        _minimax_h3,
        2,
        axes="BNC",
        side="before",
        references=lambda call: (call.grid[1] * call.grid[2] + 9, 0),
        first_latent=lambda call: call.grid[1] * call.grid[2],
        single=True,
    ),
    TinyModel("CogVideoXTransformer3DModel", COGVIDEOX, _cogvideox, 2, axes="BFCHW", side="before"),
    TinyModel(
        "ConsisIDTransformer3DModel",
        COGVIDEOX,
        _cogvideox,
        2,
        axes="BFCHW",
        side="before",
    ),
    TinyModel(
        "MochiTransformer3DModel",
        HEADS | dict(num_layers=2, pooled_projection_dim=16, in_channels=12, text_embed_dim=16, time_embed_dim=8),
        _mochi,
        2,
        **TEXT_AFTER,
        text=(),  # it conditions all tokens too
        unbatched=True,
    ),
    TinyModel("LTXVideoTransformer3DModel", LTX, _ltx, 2, axes="BNC"),
    TinyModel("LTX2VideoTransformer3DModel", LTX | LTX2, _ltx2, 2, axes="BNC"),
    TinyModel("SanaWMLTX2RefinerTransformer3DModel", LTX | LTX2, _sana_wm_refiner, 2, axes="BNC"),
    TinyModel(
        "CosmosTransformer3DModel",
        HEADS
        | dict(num_layers=2, in_channels=4, out_channels=4, text_embed_dim=16, adaln_lora_dim=4)
        | dict(concat_padding_mask=False),
        _cosmos,
        2,
    ),
    TinyModel(
        "Cosmos3OmniTransformer",
        dict(head_dim=16, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
        | dict(latent_channel=4, patch_latent_dim=16, num_hidden_layers=2, vocab_size=32, rope_axes_dim=(4, 2, 2))
        | dict(sound_gen=True, sound_dim=8),
        _cosmos3,
        2,
        axes="1CFHW",
        latents="vision_tokens",
        side="before",
        text=(),  # token numbers
        references=lambda call: (0, 9),
        causal_text=True,
        single=True,
    ),
    TinyModel(
        "AllegroTransformer3DModel",
        HEADS | dict(num_layers=2, in_channels=4, out_channels=4, cross_attention_dim=32, caption_channels=16),
        _wan,
        2,
    ),
    TinyModel(
        "EasyAnimateTransformer3DModel",
        HEADS
        | dict(num_layers=2, mmdit_layers=2, in_channels=4, out_channels=4, patch_size=2, text_embed_dim=16)
        | dict(time_embed_dim=8),
        _wan,
        2,
        side="before",
    ),
    TinyModel("MotifVideoTransformer3DModel", HUNYUAN | dict(rope_axes_dim=(4, 6, 6)), _motif, 2, **TEXT_AFTER),
    TinyModel("Kandinsky5Transformer3DModel", KANDINSKY, _kandinsky5, 2, axes="BFHWC"),
    TinyModel(
        "Kandinsky6Transformer3DModel",
        KANDINSKY | dict(visual_cond=False, in_audio_dim=4, out_audio_dim=4),
        _kandinsky6,
        2,
        axes="BFHWC",
    ),
]
