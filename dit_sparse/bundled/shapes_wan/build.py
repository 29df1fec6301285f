"""The parts of the model folder: tokenizer, text encoder, transformer, autoencoder, scheduler."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from . import prompts
from .autoencoder import CHANNELS, build_autoencoder, fold
from .scenes import Size, clip

TEXT_DIM = 64
FLOW_SHIFT = 2.0


def build_tokenizer():
    """A T5 tokenizer whose pieces are the words of the prompts, and single characters for everything else."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [(f"▁{word}", -2.0) for word in prompts.words()] + [(",", -2.0)]
    printable = (chr(code) for code in range(33, 127) if chr(code) != ",")
    characters = [("▁", -8.0)] + [(character, -10.0) for character in printable]
    return T5Tokenizer(vocab=specials + pieces + characters, extra_ids=0, model_max_length=512)


def build_text_encoder(tokenizer):
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


def build_transformer():
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
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
        # Start from attention by likeness: with equal projections a token looks for its own texture elsewhere.
        # Normalised queries and keys bound the logits; a wider bound lets attention single out a token.
        for block in transformer.blocks:
            block.attn1.to_k.load_state_dict(block.attn1.to_q.state_dict())
            block.attn1.norm_q.weight.fill_(1.4)
            block.attn1.norm_k.weight.fill_(1.4)
            # The prompt starts silent. While what it says is noise, attention would learn to look at the padding.
            block.attn2.to_out[0].weight.zero_()
    return transformer


def latent_statistics(clips=48):
    """Mean and standard deviation of each latent channel over some fixed clips."""
    size = Size.of_tokens(8, 16, 16)
    latents = torch.stack([fold(clip(seed, size)[1]) for seed in range(clips)])
    return latents.mean(dim=(0, 2, 3, 4)).tolist(), latents.std(dim=(0, 2, 3, 4)).tolist()


def encode_prompts(tokenizer, text_encoder, texts, length):
    """Embeddings (batch, at least length, TEXT_DIM) as `WanPipeline` makes them: zeros after the end of each prompt.

    Encoding only the longest prompt is exact, because the attention mask hides the padding.
    """
    inputs = tokenizer(texts, padding="longest", return_tensors="pt")
    inputs = inputs.to(text_encoder.device)
    embeddings = text_encoder(inputs.input_ids, inputs.attention_mask).last_hidden_state
    embeddings = embeddings * inputs.attention_mask[..., None]
    return torch.nn.functional.pad(embeddings, (0, 0, 0, max(0, length - embeddings.shape[1])))


def save_pipeline(folder, tokenizer, text_encoder, transformer, statistics):
    """Write a folder for `WanPipeline.from_pretrained`; the arguments are left as they are.

    The transformer is stored in half precision and loads as float32. The text encoder is stored in full, because
    its library would otherwise compute in the precision of the file.
    """
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=build_autoencoder(*statistics),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        transformer=None,
    )
    pipeline.register_modules(transformer=_half_copy(transformer))
    pipeline.save_pretrained(folder)


def _half_copy(transformer):
    copy = WanTransformer3DModel.from_config(transformer.config)
    copy.load_state_dict(transformer.state_dict())
    return copy.half()
