"""Check generated videos against their prompts: `python -m dit_sparse.bundled.shapes_wan.judge FOLDER` prints JSON.

The judge segments each colour from the nearly grey background, counts its connected regions in every frame, matches
templates of circle, square and triangle in several sizes, and follows the centroids over time. It uses no trained
network.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanImageToVideoPipeline
from scipy import ndimage
from torch import Tensor

from . import prompts
from .first_frame import draw, prompt_scene
from .scenes import (
    COLOURS,
    DIRECTIONS,
    PATCH,
    RADIUS,
    SHAPES,
    Scene,
    Size,
    Sprite,
    min_gap,
    random_scene,
    signed_distance,
)

MIN_AREA = 32  # pixels of a region that counts as an object, two tokens
MIN_CHROMA = 0.48  # of a sprite's pixels, in units of pixels in [-1, 1]
TEMPLATE_SCALES = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3)  # of a shape, relative to its size in the training clips
MIN_SPEED = 0.4  # pixels per frame of a moving sprite
MAX_JUMP = 3.0  # pixels that the centre may be away from its straight path in any frame


@dataclass(frozen=True)
class Task:
    """A prompt to generate and judge, with the seed of its first frame and noise."""

    text: str
    seed: int

    def scene(self, size: Size) -> Scene:
        """Return the scene of a clip of this size."""
        return prompt_scene(self.text, size, self.seed)


@dataclass(frozen=True)
class Verdict:
    """What is right about one sprite.

    Attributes:
        colour: it is visible in every frame.
        number: in every frame there is one region of its colour and none of a colour that the prompt does not name.
        shape: the best template over all frames is that of the prompt.
        direction: the line fitted to its centres points in the direction of the prompt.
        path: its centre stays within ``MAX_JUMP`` of that line and of even motion in every frame.
    """

    colour: bool
    number: bool
    shape: bool
    direction: bool
    path: bool


def held_out_tasks(count: int, size: Size) -> list[Task]:
    """Return a fixed list of tasks: 40 % with one sprite, 60 % with a pair that training excludes, without overlap."""
    rng, tasks = random.Random("held-out prompts"), []
    while len(tasks) < count:
        scene = random_scene(size, rng)
        is_single = len(tasks) % 5 < 2
        task = Task(prompts.describe(scene, rng), len(tasks))
        suitable = len(scene.sprites) == 1 if is_single else prompts.is_held_out(scene)
        if suitable and min_gap(task.scene(size).sprites, size.frames) > 0:
            tasks.append(task)
    return tasks


def judge(video: Tensor, sprites: Sequence[Sprite]) -> list[Verdict]:
    """Return the verdict on each sprite of a video ``[3, frames, height, width]`` in [-1, 1]."""
    masks = {colour: colour_masks(video, colour) for colour in COLOURS}
    counts = {colour: [_count_regions(mask) for mask in frames] for colour, frames in masks.items()}
    unnamed = set(COLOURS) - {sprite.colour for sprite in sprites}
    no_others = not any(count for colour in unnamed for count in counts[colour])
    return [_judge_sprite(video, masks[s.colour], counts[s.colour], s, no_others) for s in sprites]


def _judge_sprite(video: Tensor, masks: Tensor, counts: list[int], sprite: Sprite, no_others: bool) -> Verdict:
    if min(counts) < 1:
        return Verdict(False, False, False, False, False)
    centres = torch.stack([_centroid(mask) for mask in masks])
    velocity, deviation = fit_motion(centres)
    return Verdict(
        colour=True,
        number=no_others and max(counts) == 1,
        shape=classify_shape(colour_strength(video, sprite.colour)) == sprite.shape,
        direction=classify_direction(velocity) == sprite.direction,
        path=deviation <= MAX_JUMP,
    )


def _count_regions(mask: Tensor) -> int:
    """Return the number of connected regions of at least ``MIN_AREA`` pixels in a mask ``[height, width]``."""
    labels, _ = ndimage.label(mask.numpy())
    return int((torch.from_numpy(labels).flatten().bincount()[1:] >= MIN_AREA).sum())


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


def fit_motion(centres: Tensor) -> tuple[Tensor, float]:
    """Fit even motion to centres ``[frames, 2]``.

    Returns:
        The velocity in pixels per frame, ``[2]``, and the largest distance in pixels of a centre from its fitted place.
    """
    times = torch.arange(len(centres)) - (len(centres) - 1) / 2
    velocity = (times[:, None] * centres).sum(0) / times.square().sum().clamp_min(1)
    fitted = centres.mean(0) + times[:, None] * velocity
    return velocity, (centres - fitted).norm(dim=1).max().item()


def classify_direction(velocity: Tensor) -> str | None:
    """Return the direction of a velocity ``[2]``, or None if it is too slow or too diagonal."""
    along, across = velocity.abs().max().item(), velocity.abs().min().item()
    if along < MIN_SPEED or across > 0.5 * along:
        return None
    return max(DIRECTIONS, key=lambda name: velocity @ torch.tensor(DIRECTIONS[name], dtype=torch.float32))


def accuracy(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Return the fraction of verdicts in which each attribute is right, and with everything right."""
    answers = {field.name: [getattr(v, field.name) for v in verdicts] for field in fields(Verdict)}
    answers["everything"] = [all(asdict(v).values()) for v in verdicts]
    return {name: round(sum(values) / max(1, len(values)), 3) for name, values in answers.items()}


def generate_video(pipeline: WanImageToVideoPipeline, task: Task, size: Size, steps: int, guidance: float) -> Tensor:
    """Return a generated video, ``[3, frames, height, width]`` in [-1, 1].

    The pipeline generates one frame more than ``num_frames`` with this autoencoder, so it gets one less.
    """
    frames = pipeline(
        image=draw(task.scene(size), size, task.seed),
        prompt=task.text,
        height=size.height,
        width=size.width,
        num_frames=size.frames - 1,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(task.seed),
        output_type="pt",
    ).frames[0]
    return frames.transpose(0, 1).float().cpu() * 2 - 1


def judge_pipeline(
    pipeline: WanImageToVideoPipeline, size: Size, count: int = 60, steps: int = 16, guidance: float = 2.0
) -> dict:
    """Generate ``count`` held-out prompts, judge the videos, and return the report for JSON."""
    start, singles, pairs, failed = time.monotonic(), [], [], []
    for task in held_out_tasks(count, size):
        verdicts = judge(generate_video(pipeline, task, size, steps, guidance), task.scene(size).sprites)
        (singles if len(verdicts) == 1 else pairs).extend(verdicts)
        failed += [
            {"prompt": task.text, "seed": task.seed} | asdict(v) for v in verdicts if not all(asdict(v).values())
        ]
    return {
        "prompts": count,
        "tokens": [size.frames, size.height // PATCH, size.width // PATCH],
        "steps": steps,
        "guidance": guidance,
        "seconds": round(time.monotonic() - start),
        "all": accuracy(singles + pairs),
        "one_object": accuracy(singles),
        "two_objects": accuracy(pairs),
        "failed": failed,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder of an exported model")
    parser.add_argument("--prompts", type=int, default=60, help="number of held-out prompts")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--tokens", type=int, nargs=3, default=(8, 16, 16), metavar=("FRAMES", "ROWS", "COLUMNS"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipeline = WanImageToVideoPipeline.from_pretrained(options.folder)
    pipeline.set_progress_bar_config(disable=True)
    size = Size.from_tokens(*options.tokens)
    report = json.dumps(judge_pipeline(pipeline, size, options.prompts, options.steps, options.guidance), indent=1)
    print(report)
    if options.out:
        options.out.write_text(report + "\n")


if __name__ == "__main__":
    main()
