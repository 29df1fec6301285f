"""Check generated videos against their prompts: `python -m dit_sparse.bundled.shapes_wan.judge FOLDER` prints JSON.

The judge segments each colour of the prompt from the nearly grey background, matches templates of circle, square and
triangle in several sizes, and fits a line to the centroids over time. It uses no trained network.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from torch import Tensor

from . import prompts
from .scenes import (
    COLOURS,
    DIRECTIONS,
    MIN_SIDE_FOR_TWO,
    PATCH,
    RADIUS,
    SHAPES,
    Size,
    Sprite,
    random_scene,
    signed_distance,
)

MIN_AREA = 32  # pixels of a visible sprite in a frame, two tokens
MIN_CHROMA = 0.48  # of a sprite's pixels, in units of pixels in [-1, 1]
TEMPLATE_SCALES = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3)  # of a shape, relative to its size in the training clips
MIN_SPEED = 0.4  # pixels per frame of a moving sprite


@dataclass(frozen=True)
class Task:
    """A prompt to generate and judge.

    Attributes:
        text: the prompt.
        seed: seed of the generation.
        sprites: the sprites that the prompt names.
    """

    text: str
    seed: int
    sprites: tuple[Sprite, ...]


@dataclass(frozen=True)
class Verdict:
    """Whether colour, shape and direction of one sprite are right; all False if its colour is not found."""

    colour: bool
    shape: bool
    direction: bool


def held_out_tasks(count: int = 60, size: Size | None = None) -> list[Task]:
    """Return a fixed list of tasks: 40 % with one sprite, 60 % with a pair that training excludes.

    Raises:
        ValueError: if the frames are too small for pairs.
    """
    size = size or Size(21, 80, 80)
    if min(size.height, size.width) < MIN_SIDE_FOR_TWO:
        raise ValueError(
            f"height and width must be at least {MIN_SIDE_FOR_TWO} pixels for pairs of sprites, "
            f"got {size.height}x{size.width}"
        )
    rng = random.Random("held-out prompts")
    tasks = []
    while len(tasks) < count:
        scene = random_scene(size, rng)
        is_single = len(tasks) % 5 < 2
        if len(scene.sprites) == 1 if is_single else prompts.is_held_out(scene):
            tasks.append(Task(prompts.describe(scene, rng), len(tasks), scene.sprites))
    return tasks


def judge(video: Tensor, sprite: Sprite) -> Verdict:
    """Return the verdict on one sprite in a video ``[3, frames, height, width]`` in [-1, 1]."""
    masks = colour_masks(video, sprite.colour)
    areas = masks.sum(dim=(1, 2))
    visible = areas > MIN_AREA
    if visible.float().mean() < 0.6:
        return Verdict(False, False, False)
    # Frames in which the sprite is partly occluded would distort outline and path.
    unoccluded = visible & (areas > 0.75 * areas[visible].median())
    frames = unoccluded.nonzero()[:, 0]
    centroids = torch.stack([_centroid(mask) for mask in masks[frames]])
    return Verdict(
        colour=True,
        shape=classify_shape(colour_strength(video[:, frames], sprite.colour)) == sprite.shape,
        direction=classify_direction(frames, centroids) == sprite.direction,
    )


def colour_masks(video: Tensor, colour: str) -> Tensor:
    """Return where a video has a named colour, 0 or 1, ``[frames, height, width]``, without isolated pixels."""
    smooth = F.avg_pool2d(video.transpose(0, 1), 3, stride=1, padding=1, count_include_pad=False)
    components, chroma = _project_onto_hues(smooth)
    coloured = chroma.norm(dim=1) > MIN_CHROMA
    mask = ((components.argmax(dim=0) == list(COLOURS).index(colour)) & coloured).float()
    neighbours = F.avg_pool2d(mask[:, None], 5, stride=1, padding=2)[:, 0]
    return mask * (neighbours > 0.3)


def colour_strength(video: Tensor, colour: str) -> Tensor:
    """Return the strength of a named colour in [0, 1], ``[frames, height, width]``; 0 where another is nearer."""
    components, _ = _project_onto_hues(video.transpose(0, 1))
    index = list(COLOURS).index(colour)
    strength = (components[index] / _chroma(torch.tensor(COLOURS[colour]), 0).norm()).clamp(0, 1)
    return strength * (components.argmax(dim=0) == index)


def _project_onto_hues(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the components of the chroma along each named hue, and the chroma.

    Args:
        pixels: ``[frames, 3, height, width]``.

    Returns:
        ``[colours, frames, height, width]`` and ``[frames, 3, height, width]``.
    """
    chroma = _chroma(pixels, 1)
    hues = F.normalize(_chroma(torch.tensor(list(COLOURS.values())), 1), dim=1)
    return torch.einsum("kc,fchw->kfhw", hues, chroma), chroma


def _chroma(pixels: Tensor, dim: int) -> Tensor:
    """Return pixels without their brightness, the mean over the colour dimension ``dim``."""
    return pixels - pixels.mean(dim=dim, keepdim=True)


def _centroid(mask: Tensor) -> Tensor:
    """Return the centroid of a mask ``[height, width]`` as x, y in pixels, ``[2]``."""
    rows, columns = mask.nonzero().float().unbind(1)
    return torch.stack([columns.mean(), rows.mean()])


def classify_shape(strength: Tensor) -> str:
    """Return the shape whose template fits ``strength [frames, height, width]`` in [0, 1] best in least squares.

    Position and size are free in every frame, so a second object of the same colour does not affect the result.
    """
    scores = {}
    for shape in SHAPES:
        templates = _templates(shape)
        # |strength - template|^2 is smallest where the sum of 2 * strength - 1 inside the template is largest.
        gain = F.conv2d(2 * strength[:, None] - 1, templates, padding=templates.shape[-1] // 2)
        scores[shape] = gain.amax(dim=(1, 2, 3)).sum().item()
    return max(scores, key=scores.get)


def _templates(shape: str) -> Tensor:
    """Return binary masks of a shape in all scales, ``[scales, 1, side, side]``."""
    margin = round(RADIUS * TEMPLATE_SCALES[-1]) + 1
    axis = torch.arange(-margin, margin + 1).float()
    masks = [signed_distance(shape, axis[None, :], axis[:, None], RADIUS * scale) < 0 for scale in TEMPLATE_SCALES]
    return torch.stack(masks)[:, None].float()


def classify_direction(frames: Tensor, centroids: Tensor) -> str | None:
    """Return the direction of the line fitted to the centroids, or None if it is too slow or too diagonal.

    Args:
        frames: frame numbers ``[F]``.
        centroids: x, y in pixels, ``[F, 2]``.
    """
    if len(frames) < 2:
        return None
    times = frames.float() - frames.float().mean()
    velocity = (times[:, None] * (centroids - centroids.mean(0))).sum(0) / times.square().sum()
    along, across = velocity.abs().max().item(), velocity.abs().min().item()
    if along < MIN_SPEED or across > 0.5 * along:
        return None
    return max(DIRECTIONS, key=lambda name: velocity @ torch.tensor(DIRECTIONS[name], dtype=torch.float32))


def accuracy(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Return the fraction of verdicts with the right colour, shape and direction, and with everything right."""
    answers = {name: [asdict(v)[name] for v in verdicts] for name in ("colour", "shape", "direction")}
    answers["everything"] = [all(asdict(v).values()) for v in verdicts]
    return {name: round(sum(values) / max(1, len(values)), 3) for name, values in answers.items()}


def generate_video(pipeline: WanPipeline, text: str, size: Size, seed: int, steps: int, guidance: float) -> Tensor:
    """Return a generated video, ``[3, frames, height, width]`` in [-1, 1].

    The pipeline generates one frame more than ``num_frames`` with this autoencoder, so it gets one less.
    """
    frames = pipeline(
        text,
        height=size.height,
        width=size.width,
        num_frames=size.frames - 1,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).frames[0]
    return frames.transpose(0, 1).float().cpu() * 2 - 1


def judge_pipeline(pipeline: WanPipeline, size: Size, count: int = 60, steps: int = 16, guidance: float = 4.0) -> dict:
    """Generate ``count`` held-out prompts, judge the videos, and return the report for JSON."""
    start, singles, pairs = time.monotonic(), [], []
    for task in held_out_tasks(count):
        video = generate_video(pipeline, task.text, size, task.seed, steps, guidance)
        verdicts = [judge(video, sprite) for sprite in task.sprites]
        (singles if len(verdicts) == 1 else pairs).extend(verdicts)
    return {
        "prompts": count,
        "tokens": [size.frames, size.height // PATCH, size.width // PATCH],
        "steps": steps,
        "guidance": guidance,
        "seconds": round(time.monotonic() - start),
        "all": accuracy(singles + pairs),
        "one_object": accuracy(singles),
        "two_objects": accuracy(pairs),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder of an exported model")
    parser.add_argument("--prompts", type=int, default=60, help="number of held-out prompts")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--tokens", type=int, nargs=3, default=(6, 16, 16), metavar=("FRAMES", "ROWS", "COLUMNS"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipeline = WanPipeline.from_pretrained(options.folder)
    pipeline.set_progress_bar_config(disable=True)
    size = Size.from_tokens(*options.tokens)
    report = json.dumps(judge_pipeline(pipeline, size, options.prompts, options.steps, options.guidance), indent=1)
    print(report)
    if options.out:
        options.out.write_text(report + "\n")


if __name__ == "__main__":
    main()
