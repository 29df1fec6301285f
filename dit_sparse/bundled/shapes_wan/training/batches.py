"""Training batches: clips, noise, noise levels and prompts, generated on the fly from a number."""

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import prompts
from ..autoencoder import patchify
from ..scenes import Scene, Size, make_clip
from .curriculum import Stage, sample_noise_levels

PROMPT_DROPOUT = 0.12  # share of clips with an empty prompt, for classifier-free guidance
MISMATCH_SHARE = 0.4  # share of the other clips with a mismatched prompt, which costs a second forward and backward


@dataclass(frozen=True)
class Batch:
    """Clips of one size with their prompts.

    Attributes:
        latents: normalised latents, ``[B, 48, frames, rows, columns]``.
        noise: of the same shape.
        levels: noise levels, ``[B]``.
        texts: prompts; empty for unconditional clips.
        mismatched_texts: mismatched prompts; equal to ``texts`` for clips without one.
        text_length: number of tokens to which prompts are padded at least.
    """

    latents: Tensor
    noise: Tensor
    levels: Tensor
    texts: list[str]
    mismatched_texts: list[str]
    text_length: int

    def to(self, device: str) -> "Batch":
        """Return the batch with its tensors on ``device``."""
        return replace(
            self, latents=self.latents.to(device), noise=self.noise.to(device), levels=self.levels.to(device)
        )


def make_batch(stage: Stage, number: int, statistics: tuple[list[float], list[float]], scale: int = 1) -> Batch:
    """Return a random batch of a curriculum stage, deterministic in ``number``.

    Args:
        statistics: mean and standard deviation of each latent channel.
        scale: factor of the stage's batch sizes.
    """
    rng, generator = random.Random(number), torch.Generator().manual_seed(number)
    count, tokens = rng.choice(stage.batches)
    count, size = count * scale, Size.from_tokens(*tokens)
    latents, texts, mismatched_texts = [], [], []
    for index in range(count):
        clip_seed = number * 4096 + index
        scene, video = make_clip(clip_seed, size, accept=lambda scene: not prompts.is_held_out(scene))
        text, mismatched_text = _draw_prompts(scene, clip_seed, rng)
        latents.append(patchify(video))
        texts.append(text)
        mismatched_texts.append(mismatched_text)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in statistics)
    latents = (torch.stack(latents) - mean) / std
    noise = torch.randn(latents.shape, generator=generator)
    levels = sample_noise_levels(count, generator)
    return Batch(latents, noise, levels, texts, mismatched_texts, rng.choice(stage.text_lengths))


def _draw_prompts(scene: Scene, clip_seed: int, rng: random.Random) -> tuple[str, str]:
    """Return the prompt of a clip and its mismatched prompt, as `Batch` describes them."""
    if rng.random() < PROMPT_DROPOUT:
        return "", ""
    text = prompts.describe_seeded(scene, clip_seed)
    if rng.random() > MISMATCH_SHARE:
        return text, text
    return text, prompts.describe_seeded(prompts.make_mismatched(scene, rng), clip_seed)
