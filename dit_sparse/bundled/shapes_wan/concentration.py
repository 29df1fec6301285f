"""Measure attention concentration and loss: `python -m dit_sparse.bundled.shapes_wan.concentration FOLDER`.

Queries and keys are split into blocks of 64 consecutive tokens. For each query block the measure is the attention mass
on the quarter of the key blocks with the most: 0.25 for uniform attention, 1 for fully concentrated attention.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanImageToVideoPipeline
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..attention_mass import BLOCK, DENSITY, attention_weights, top_block_mass
from . import prompts
from .autoencoder import patchify
from .conditioning import add_noise
from .scenes import PATCH, Size, make_clip

HELD_OUT_SEED = 2**45  # training clips have smaller seeds


def other_frames_mass(weights: Tensor, frames: int) -> Tensor:
    """Return the attention mass on other frames than the query's, ``[H]``, of weights ``[B, H, N, N]``."""
    by_frame = weights.unflatten(-1, (frames, -1)).sum(-1).unflatten(-2, (frames, -1)).mean(-2)
    return 1 - by_frame.diagonal(dim1=-2, dim2=-1).mean(dim=(0, 2))


class SelfAttentionProbe(TorchFunctionMode):
    """Context manager that measures every self-attention call over all tokens of a clip.

    Attributes:
        layers: for each call in order, ``[2, H]``: top-block mass and other-frames mass.
    """

    def __init__(self, size: Size):
        super().__init__()
        self.size, self.layers = size, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            query, key = args[:2] or (kwargs["query"], kwargs["key"])
            if query.shape[-2] == key.shape[-2] == self.size.tokens:
                weights = attention_weights(query.float(), key.float())
                masses = top_block_mass(weights), other_frames_mass(weights, self.size.frames)
                self.layers.append(torch.stack(masses))
        return function(*args, **kwargs)


def held_out_clip(pipeline: WanImageToVideoPipeline, size: Size, seed: int) -> tuple[Tensor, Tensor]:
    """Return normalised latents ``[1, 12, frames, 2 * rows, 2 * columns]`` and prompt embeddings ``[1, 512, 64]``."""
    scene, video = make_clip(seed, size)
    text = prompts.describe_seeded(scene, seed)
    embeddings, _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=512)
    config = pipeline.vae.config
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    return ((patchify(video) - mean) / std)[None], embeddings


@torch.no_grad()
def measure_concentration(
    pipeline: WanImageToVideoPipeline, size: Size, levels: Sequence[float] = (0.3, 0.6, 0.9), clips: int = 2
) -> dict:
    """Return the report of attention masses by noise level, layer and head, and losses by noise level, for JSON.

    Args:
        levels: noise levels in (0, 1).
        clips: number of held-out clips to average over.
    """
    masses, losses = [[] for _ in levels], [[] for _ in levels]
    for index in range(clips):
        latents, embeddings = held_out_clip(pipeline, size, HELD_OUT_SEED + index)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(index))
        for row, level in enumerate(levels):
            noisy, timesteps = add_noise(latents, noise, torch.tensor([level]))
            with SelfAttentionProbe(size) as probe:
                velocity = pipeline.transformer(noisy, timesteps, embeddings).sample
            masses[row].append(torch.stack(probe.layers))
            losses[row].append((velocity - (noise - latents))[:, :, 1:].square().mean())
    top, other_frames = torch.stack([torch.stack(row).mean(0) for row in masses]).unbind(2)
    return {
        "tokens": [size.frames, size.height // PATCH, size.width // PATCH],
        "block": BLOCK,
        "kept": DENSITY,
        "mean": round(top.mean().item(), 3),
        "heads_above_0.9": round((top.mean(0) > 0.9).float().mean().item(), 3),
        "other_frames": round(other_frames.mean().item(), 3),
        "shares": {str(level): _round_table(table) for level, table in zip(levels, top, strict=True)},
        "shares_of_other_frames": {
            str(level): _round_table(table) for level, table in zip(levels, other_frames, strict=True)
        },
        "losses": {
            str(level): round(torch.stack(row).mean().item(), 4) for level, row in zip(levels, losses, strict=True)
        },
    }


def _round_table(table: Tensor) -> list[list[float]]:
    return [[round(value, 3) for value in row] for row in table.tolist()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder of an exported model")
    parser.add_argument("--tokens", type=int, nargs=3, default=(14, 24, 24), metavar=("FRAMES", "ROWS", "COLUMNS"))
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipeline = WanImageToVideoPipeline.from_pretrained(options.folder)
    size = Size.from_tokens(*options.tokens)
    report = json.dumps(measure_concentration(pipeline, size, clips=options.clips))
    print(report)
    if options.out:
        options.out.write_text(report + "\n")


if __name__ == "__main__":
    main()
