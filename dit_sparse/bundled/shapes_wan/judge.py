"""Does the video show what the prompt says? `python -m dit_sparse.bundled.shapes_wan.judge FOLDER` answers in JSON.

The judge looks for every named colour against the nearly grey background, lays circle, square and triangle of several
sizes on what it finds, and follows the centre over time. It asks nothing of a trained network.
"""

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanPipeline

from . import prompts
from .scenes import COLOURS, DIRECTIONS, RADIUS, ROOM_FOR_TWO, SHAPES, Size, Sprite, outside, random_scene

SMALLEST = 32  # pixels that a sprite covers at least, two tokens
VIVID = 0.30  # chroma, in units of pixels from -1 to 1, above which a pixel belongs to a sprite
SIZES = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3)  # of a shape, relative to what the scenes have
SLOWEST = 0.4  # pixels per frame above which something moves


@dataclass(frozen=True)
class Task:
    """A prompt, the seed to generate it with, and the sprites that it names."""

    text: str
    seed: int
    sprites: tuple[Sprite, ...]


@dataclass(frozen=True)
class Verdict:
    """What is right about one sprite. Without the colour nothing else can be found, so nothing else is right."""

    colour: bool
    shape: bool
    direction: bool


def held_out_tasks(count=60, size=None):
    """The fixed list: two in five have one sprite, the others a pair that training never saw in any wording.

    Raises ValueError for frames too small for pairs.
    """
    size = size or Size(21, 80, 80)
    if min(size.height, size.width) < ROOM_FOR_TWO:
        raise ValueError(f"pairs need frames of {ROOM_FOR_TWO} pixels at least, not {size.height} x {size.width}")
    rng = random.Random("held-out prompts")
    tasks = []
    while len(tasks) < count:
        scene = random_scene(size, rng)
        single_wanted = len(tasks) % 5 < 2
        suitable = len(scene.sprites) == 1 if single_wanted else prompts.held_out(scene)
        if suitable:
            tasks.append(Task(prompts.describe(scene, rng), len(tasks), scene.sprites))
    return tasks


def judge(video, sprite):
    """Verdict on one sprite in a video of (3, frames, height, width) in [-1, 1]."""
    masks = colour_masks(video, sprite.colour)
    areas = masks.sum(dim=(1, 2))
    seen = areas > SMALLEST
    if seen.float().mean() < 0.6:
        return Verdict(False, False, False)
    # Frames in which the sprite is partly hidden would blur both its outline and its path.
    whole = seen & (areas > 0.75 * areas[seen].median())
    frames = whole.nonzero()[:, 0]
    centres = torch.stack([_centre(mask) for mask in masks[frames]])
    return Verdict(
        colour=True,
        shape=nearest_shape(colour_strength(video[:, frames], sprite.colour)) == sprite.shape,
        direction=nearest_direction(frames, centres) == sprite.direction,
    )


def colour_masks(video, colour):
    """Where the video has a named colour: 0 or 1, (frames, height, width), without specks."""
    smooth = F.avg_pool2d(video.transpose(0, 1), 3, stride=1, padding=1, count_include_pad=False)
    along, chroma = _along_hues(smooth)
    vivid = chroma.norm(dim=1) > VIVID * 1.6
    mask = ((along.argmax(dim=0) == list(COLOURS).index(colour)) & vivid).float()
    neighbours = F.avg_pool2d(mask[:, None], 5, stride=1, padding=2)[:, 0]
    return mask * (neighbours > 0.3)


def colour_strength(video, colour):
    """How much of a named colour each pixel has, from 0 to 1, (frames, height, width); 0 where another is nearer."""
    along, _ = _along_hues(video.transpose(0, 1))
    index = list(COLOURS).index(colour)
    strength = (along[index] / _chroma(torch.tensor(COLOURS[colour]), 0).norm()).clamp(0, 1)
    return strength * (along.argmax(dim=0) == index)


def _along_hues(pixels):
    """Component of (frames, 3, height, width) along the hue of each colour, (colours, frames, height, width), and
    what is left of the pixels without their brightness."""
    chroma = _chroma(pixels, 1)
    hues = F.normalize(_chroma(torch.tensor(list(COLOURS.values())), 1), dim=1)
    return torch.einsum("kc,fchw->kfhw", hues, chroma), chroma


def _chroma(pixels, dim):
    return pixels - pixels.mean(dim=dim, keepdim=True)


def _centre(mask):
    """Centre of mass as x, y in pixels, (2,)."""
    rows, columns = mask.nonzero().float().unbind(1)
    return torch.stack([columns.mean(), rows.mean()])


def nearest_shape(strength):
    """The shape that explains (frames, height, width) in [0, 1] best: one inside, zero outside, in the least squares.

    Place and size are free in every frame, so a second object of the same colour does not count against the first.
    """
    scores = {}
    for shape in SHAPES:
        templates = _templates(shape)
        # |strength - template|^2 is smallest where the sum of 2 * strength - 1 inside the template is largest.
        gain = F.conv2d(2 * strength[:, None] - 1, templates, padding=templates.shape[-1] // 2)
        scores[shape] = gain.amax(dim=(1, 2, 3)).sum().item()
    return max(scores, key=scores.get)


def _templates(shape):
    """The shape in all sizes, (sizes, 1, side, side)."""
    margin = round(RADIUS * SIZES[-1]) + 1
    axis = torch.arange(-margin, margin + 1).float()
    insides = [outside(shape, axis[None, :], axis[:, None], RADIUS * size) < 0 for size in SIZES]
    return torch.stack(insides)[:, None].float()


def nearest_direction(frames, centres):
    """Direction of the straight line through the centres, or None for something that hardly moves or slants."""
    if len(frames) < 2:
        return None
    when = frames.float() - frames.float().mean()
    velocity = (when[:, None] * (centres - centres.mean(0))).sum(0) / when.square().sum()
    along, across = velocity.abs().max().item(), velocity.abs().min().item()
    if along < SLOWEST or across > 0.5 * along:
        return None
    return max(DIRECTIONS, key=lambda name: velocity @ torch.tensor(DIRECTIONS[name], dtype=torch.float32))


def shares(verdicts):
    """Share of right answers over a list of verdicts."""
    table = {name: [asdict(v)[name] for v in verdicts] for name in ("colour", "shape", "direction")}
    table["everything"] = [all(asdict(v).values()) for v in verdicts]
    return {name: round(sum(answers) / max(1, len(answers)), 3) for name, answers in table.items()}


def generate(pipeline, text, size, seed, steps, guidance):
    """A video of (3, frames, height, width) in [-1, 1]. The pipeline adds a frame to what it is asked for."""
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


def judge_pipeline(pipeline, size, count=60, steps=16, guidance=4.0):
    """Generate the held-out prompts and judge them; a report ready for JSON."""
    started, singles, pairs = time.monotonic(), [], []
    for task in held_out_tasks(count):
        video = generate(pipeline, task.text, size, task.seed, steps, guidance)
        verdicts = [judge(video, sprite) for sprite in task.sprites]
        (singles if len(verdicts) == 1 else pairs).extend(verdicts)
    return {
        "prompts": count,
        "tokens": [size.frames, size.height // 4, size.width // 4],
        "steps": steps,
        "guidance": guidance,
        "seconds": round(time.monotonic() - started),
        "all": shares(singles + pairs),
        "one_object": shares(singles),
        "two_objects": shares(pairs),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--tokens", type=int, nargs=3, default=(6, 16, 16), metavar=("FRAMES", "ROWS", "COLUMNS"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipeline = WanPipeline.from_pretrained(options.folder)
    pipeline.set_progress_bar_config(disable=True)
    size = Size.of_tokens(*options.tokens)
    report = json.dumps(judge_pipeline(pipeline, size, options.prompts, options.steps, options.guidance), indent=1)
    print(report)
    if options.out:
        options.out.write_text(report + "\n")


if __name__ == "__main__":
    main()
