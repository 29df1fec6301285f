"""Measure attention concentration and loss: `python -m dit_sparse.bundled.shapes_wan.concentration FOLDER`.

Keys and queries are cut into blocks of 64 consecutive tokens. For each block of queries, the number is the share of
its attention that falls on the best quarter of the key blocks: 0.25 for flat attention, 1 for fully concentrated.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from torch.overrides import TorchFunctionMode

from . import prompts
from .autoencoder import fold
from .scenes import CELL, Size, clip

BLOCK = 64
KEPT = 0.25
HELD_OUT_SEED = 2**45


def attention_weights(query, key):
    """Softmax of the scaled products: (batch, heads, tokens, dim) twice to (batch, heads, tokens, tokens)."""
    return (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)


def best_blocks_share(weights):
    """Attention held by the best key blocks, averaged over whole query blocks, (heads,)."""
    tokens = weights.shape[-1]
    whole, blocks = tokens // BLOCK, -(-tokens // BLOCK)
    by_key = (
        F.pad(weights[..., : whole * BLOCK, :], (0, blocks * BLOCK - tokens)).unflatten(-1, (blocks, BLOCK)).sum(-1)
    )
    mass = by_key.unflatten(-2, (whole, BLOCK)).mean(-2)
    return mass.topk(round(KEPT * blocks), dim=-1).values.sum(-1).mean(dim=(0, 2))


def other_frames_share(weights, frames):
    """Attention that leaves the frame of the query, (heads,)."""
    by_frame = weights.unflatten(-1, (frames, -1)).sum(-1).unflatten(-2, (frames, -1)).mean(-2)
    return 1 - by_frame.diagonal(dim1=-2, dim2=-1).mean(dim=(0, 2))


class SelfAttentionProbe(TorchFunctionMode):
    """While active, measures every attention among all tokens of a clip: (2, heads) for each layer in its order."""

    def __init__(self, size):
        super().__init__()
        self.size, self.layers = size, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            query, key = args[:2] or (kwargs["query"], kwargs["key"])
            if query.shape[-2] == key.shape[-2] == self.size.tokens:
                weights = attention_weights(query.float(), key.float())
                shares = best_blocks_share(weights), other_frames_share(weights, self.size.frames)
                self.layers.append(torch.stack(shares))
        return function(*args, **kwargs)


def held_out_clip(pipeline, size, seed):
    """Standardised latents (1, 48, frames, rows, columns) and prompt embeddings (1, 512, text) of an unseen clip."""
    scene, video = clip(seed, size)
    text = prompts.sentence(scene, seed)
    embeddings, _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=512)
    config = pipeline.vae.config
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    return ((fold(video) - mean) / std)[None], embeddings


@torch.no_grad()
def measure(pipeline, size, times=(0.3, 0.6, 0.9), clips=2):
    """Shares by noise level, layer and head, and the loss by noise level, over unseen clips; ready for JSON."""
    shares, losses = [[] for _ in times], [[] for _ in times]
    for index in range(clips):
        latents, embeddings = held_out_clip(pipeline, size, HELD_OUT_SEED + index)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(index))
        for row, time in enumerate(times):
            noisy, timestep = torch.lerp(latents, noise, time), torch.tensor([1000 * time])
            with SelfAttentionProbe(size) as probe:
                velocity = pipeline.transformer(noisy, timestep, embeddings).sample
            shares[row].append(torch.stack(probe.layers))
            losses[row].append((velocity - (noise - latents)).square().mean())
    best, elsewhere = torch.stack([torch.stack(row).mean(0) for row in shares]).unbind(2)
    return {
        "tokens": [size.frames, size.height // CELL, size.width // CELL],
        "block": BLOCK,
        "kept": KEPT,
        "mean": round(best.mean().item(), 3),
        "heads_above_0.9": round((best.mean(0) > 0.9).float().mean().item(), 3),
        "other_frames": round(elsewhere.mean().item(), 3),
        "shares": {str(time): _rounded(table) for time, table in zip(times, best, strict=True)},
        "shares_of_other_frames": {str(time): _rounded(table) for time, table in zip(times, elsewhere, strict=True)},
        "losses": {
            str(time): round(torch.stack(row).mean().item(), 4) for time, row in zip(times, losses, strict=True)
        },
    }


def _rounded(table):
    return [[round(value, 3) for value in row] for row in table.tolist()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, nargs=3, default=(21, 20, 20), metavar=("FRAMES", "ROWS", "COLUMNS"))
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipeline = WanPipeline.from_pretrained(options.folder)
    report = json.dumps(measure(pipeline, Size.of_tokens(*options.tokens), clips=options.clips))
    print(report)
    if options.out:
        options.out.write_text(report + "\n")


if __name__ == "__main__":
    main()
