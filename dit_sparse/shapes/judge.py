"""Does the video show what the prompt says? `python -m dit_sparse.shapes.judge FOLDER` answers in JSON.

The judge looks for every named colour against the nearly grey background, compares the outline of what it finds with
circle, square and triangle, and follows the centre over time. It asks nothing of a trained network.
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
from .scenes import COLOURS, DIRECTIONS, ROOM_FOR_TWO, SHAPES, Size, Sprite, outside, random_scene

SMALLEST = 32  # pixels that a sprite covers at least, two tokens
VIVID = 0.30  # chroma, in units of pixels from -1 to 1, above which a pixel belongs to a sprite
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
        shape=nearest_shape(masks[frames], centres) == sprite.shape,
        direction=nearest_direction(frames, centres) == sprite.direction,
    )


def colour_masks(video, colour):
    """Where the video has a named colour: 0 or 1, (frames, height, width), without specks."""
    smooth = F.avg_pool2d(video.transpose(0, 1), 3, stride=1, padding=1, count_include_pad=False)
    chroma = smooth - smooth.mean(dim=1, keepdim=True)
    palette = torch.tensor(list(COLOURS.values()))
    hues = F.normalize(palette - palette.mean(dim=1, keepdim=True), dim=1)
    nearest = torch.einsum("kc,fchw->kfhw", hues, chroma).argmax(dim=0)
    vivid = chroma.norm(dim=1) > VIVID * 1.6
    mask = ((nearest == list(COLOURS).index(colour)) & vivid).float()
    neighbours = F.avg_pool2d(mask[:, None], 5, stride=1, padding=2)[:, 0]
    return mask * (neighbours > 0.3)


def _centre(mask):
    """Centre of mass as x, y in pixels, (2,)."""
    rows, columns = mask.nonzero().float().unbind(1)
    return torch.stack([columns.mean(), rows.mean()])


def nearest_shape(masks, centres):
    """The shape whose outline of equal area overlaps best, by intersection over union summed over frames."""
    scores = {shape: sum(map(_overlap, masks, centres, [shape] * len(masks))) for shape in SHAPES}
    return max(scores, key=scores.get)


def _overlap(mask, centre, shape):
    area = mask.sum().item()
    unit_area, lift = {"circle": (3.1416, 0.0), "square": (3.24, 0.0), "triangle": (1.7, 0.1333)}[shape]
    radius = (area / unit_area) ** 0.5
    x = torch.arange(mask.shape[1])[None, :] - centre[0]
    y = torch.arange(mask.shape[0])[:, None] - centre[1] + lift * radius
    ideal = outside(shape, x, y, radius) < 0
    found = mask > 0
    return ((ideal & found).sum() / (ideal | found).sum().clamp_min(1)).item()


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
