"""Model components: tokenizer, text encoder and transformer, prompt encoding, and export to a diffusers folder."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from torch import Tensor
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from . import prompts
from .autoencoder import CHANNELS, build_autoencoder, patchify
from .scenes import Size, make_clip

TEXT_DIM = 64
FLOW_SHIFT = 2.0


def build_tokenizer() -> T5Tokenizer:
    """Return a T5 tokenizer with one piece for each word of the prompts, and single characters for other text."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [(f"▁{word}", -2.0) for word in prompts.vocabulary()] + [(",", -2.0)]
    printable = (chr(code) for code in range(33, 127) if chr(code) != ",")
    characters = [("▁", -8.0)] + [(character, -10.0) for character in printable]
    return T5Tokenizer(vocab=specials + pieces + characters, extra_ids=0, model_max_length=512)


def build_text_encoder(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    """Return a two-layer UMT5 encoder with random weights."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_DIM,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def build_transformer() -> WanTransformer3DModel:
    """Return a six-layer Wan transformer, initialised so that self-attention starts from similarity."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=3,
        attention_head_dim=64,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=128,
        ffn_dim=640,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    with torch.no_grad():
        transformer.proj_out.weight.zero_()
        for block in transformer.blocks:
            # With equal query and key projections a token attends to its own texture in other places.
            block.attn1.to_k.load_state_dict(block.attn1.to_q.state_dict())
            # The norm bounds the logits; a wider bound lets attention select a single token.
            block.attn1.norm_q.weight.fill_(1.4)
            block.attn1.norm_k.weight.fill_(1.4)
            # Cross-attention starts at zero. While its output is still noise, attention would learn to use padding.
            block.attn2.to_out[0].weight.zero_()
    return transformer


def latent_statistics(clips: int = 48) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each of the 12 latent channels over a fixed set of clips."""
    size = Size.from_tokens(8, 16, 16)
    latents = torch.stack([patchify(make_clip(seed, size)[1]) for seed in range(clips)])
    return latents.mean(dim=(0, 2, 3, 4)).tolist(), latents.std(dim=(0, 2, 3, 4)).tolist()


def encode_prompts(tokenizer: T5Tokenizer, text_encoder: UMT5EncoderModel, texts: Sequence[str], length: int) -> Tensor:
    """Return prompt embeddings as `WanImageToVideoPipeline` computes them, with zeros after the end of each prompt.

    The encoder runs on the length of the longest prompt. This is exact, because the attention mask hides padding.

    Args:
        texts: one prompt per clip.
        length: minimum number of tokens to pad to.

    Returns:
        ``[B, max(length, longest prompt), 64]``.
    """
    inputs = tokenizer(texts, padding="longest", return_tensors="pt")
    inputs = inputs.to(text_encoder.device)
    embeddings = text_encoder(inputs.input_ids, inputs.attention_mask).last_hidden_state
    embeddings = embeddings * inputs.attention_mask[..., None]
    return torch.nn.functional.pad(embeddings, (0, 0, 0, max(0, length - embeddings.shape[1])))


def save_pipeline(
    folder: Path,
    tokenizer: T5Tokenizer,
    text_encoder: UMT5EncoderModel,
    transformer: WanTransformer3DModel,
    statistics: tuple[list[float], list[float]],
) -> None:
    """Write a folder for `WanImageToVideoPipeline.from_pretrained`. The modules passed in are not changed.

    The transformer is stored in float16 and loads as float32. The text encoder is stored in float32, because
    transformers computes in the precision of the file.
    """
    pipeline = WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=build_autoencoder(*statistics),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        transformer=None,
        expand_timesteps=True,
    )
    pipeline.register_modules(transformer=_copy_as_half(transformer))
    pipeline.save_pretrained(folder)


def _copy_as_half(transformer: WanTransformer3DModel) -> WanTransformer3DModel:
    copy = WanTransformer3DModel.from_config(transformer.config)
    copy.load_state_dict(transformer.state_dict())
    return copy.half()
