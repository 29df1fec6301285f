"""The first frame of a clip, which `shapes-wan-i2v` takes as its image."""

from __future__ import annotations

import random

import torch
from PIL import Image

from . import prompts
from .scenes import Scene, Size, place, render


def prompt_scene(prompt: str, size: Size, seed: int) -> Scene:
    """Return the scene of a prompt, with places that depend on the seed.

    Raises:
        ValueError: the prompt names no shapes that the model knows, or not where they move.
    """
    subjects, drift = prompts.parse(prompt)
    return place(subjects, drift, size, random.Random(seed))


def draw(scene: Scene, size: Size, seed: int) -> Image.Image:
    """Draw the first frame of a scene, with textures that depend on the seed."""
    video = render(scene, size, torch.Generator().manual_seed(seed))
    return Image.fromarray(((video[:, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
