"""Training batches: clips, noise, noise levels and prompts, generated on the fly from a number."""

import random
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import prompts
from ..autoencoder import LATENT_PATCH, patchify
from ..scenes import Scene, Size, coverage, make_clip
from .curriculum import Stage, sample_noise_levels

PROMPT_DROPOUT = 0.12  # share of clips with an empty prompt, for classifier-free guidance
MOVING_WEIGHT = 4.0  # weight of the squared error where a sprite is or was, in addition to 1
MISMATCH_SHARE = 0.4  # share of the other clips with a mismatched prompt, which costs a second forward and backward


@dataclass(frozen=True)
class Batch:
    """Clips of one size with their prompts.

    Attributes:
        frames: numbers of the frames that are trained on, in order; the first is 0.
        latents: normalised latents of these frames, ``[B, 12, frames, 2 * rows, 2 * columns]``.
        noise: of the same shape.
        weights: weights of the squared error at the places of the latents, ``[B, frames, 2 * rows, 2 * columns]``.
        levels: noise levels, ``[B]``.
        texts: prompts; empty for unconditional clips.
        mismatched_texts: mismatched prompts; equal to ``texts`` for clips without one.
        text_length: number of tokens to which prompts are padded at least.
    """

    frames: tuple[int, ...]
    latents: Tensor
    noise: Tensor
    weights: Tensor
    levels: Tensor
    texts: list[str]
    mismatched_texts: list[str]
    text_length: int

    def to(self, device: str) -> "Batch":
        """Return the batch with its tensors on ``device``."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def make_batch(stage: Stage, number: int, statistics: tuple[list[float], list[float]], scale: int = 1) -> Batch:
    """Return a random batch of a curriculum stage, deterministic in ``number``.

    Args:
        statistics: mean and standard deviation of each latent channel.
        scale: factor of the stage's batch sizes.
    """
    rng, generator = random.Random(number), torch.Generator().manual_seed(number)
    count, tokens, shown = rng.choice(stage.batches)
    count, size, frames = count * scale, Size.from_tokens(*tokens), _choose_frames(tokens[0], shown, rng)
    latents, weights, texts, mismatched_texts = [], [], [], []
    for index in range(count):
        clip_seed = number * 4096 + index
        scene, video = make_clip(clip_seed, size, accept=lambda scene: not prompts.is_held_out(scene))
        text, mismatched_text = _draw_prompts(scene, clip_seed, rng)
        latents.append(patchify(video)[:, frames])
        weights.append(_moving_weights(scene, size)[list(frames)])
        texts.append(text)
        mismatched_texts.append(mismatched_text)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in statistics)
    latents = (torch.stack(latents) - mean) / std
    noise = torch.randn(latents.shape, generator=generator)
    levels = sample_noise_levels(count, generator)
    length = rng.choice(stage.text_lengths)
    return Batch(frames, latents, noise, torch.stack(weights), levels, texts, mismatched_texts, length)


def _choose_frames(frames: int, shown: int, rng: random.Random) -> tuple[int, ...]:
    """Return the first frame and ``shown - 1`` others, which are either consecutive or spread over the clip.

    A step costs what the shown frames cost, and yet trains on the distances in time of the whole clip.
    """
    if rng.random() < 0.5:
        start = rng.randint(1, frames - shown + 1)
        return (0, *range(start, start + shown - 1))
    return (0, *sorted(rng.sample(range(1, frames), shown - 1)))


def _moving_weights(scene: Scene, size: Size) -> Tensor:
    """Return weights that are larger where a sprite is, or was in the first frame; ``[frames, height / 2, width / 2]``.

    They follow from the first frame and the prompt, so they do not move the optimum of the flow. The background covers
    most of a clip and is copied from the first frame soon; motion is learned from the places that change.
    """
    covered = coverage(scene, size)
    return 1 + MOVING_WEIGHT * F.max_pool2d(torch.maximum(covered, covered[:1]), LATENT_PATCH)


def _draw_prompts(scene: Scene, clip_seed: int, rng: random.Random) -> tuple[str, str]:
    """Return the prompt of a clip and its mismatched prompt, as `Batch` describes them."""
    if rng.random() < PROMPT_DROPOUT:
        return "", ""
    text = prompts.describe_seeded(scene, clip_seed)
    if rng.random() > MISMATCH_SHARE:
        return text, text
    return text, prompts.describe_seeded(prompts.make_mismatched(scene, rng), clip_seed)
