"""Procedural clips: one or two textured shapes that move over a background of stone.

Every texture is random, has a fine grain, and moves rigidly with its object. To denoise a token, the model has to find
the same texture in other frames, above all in the first one, which is given; this concentrates its attention.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .textures import felt, marble, stripes

PATCH = 4  # pixels along each side of one token
RADIUS = 12  # pixels; every shape fills a box of 24x24
MIN_SIDE_FOR_TWO = 64  # pixels along the shorter side of a frame from which a scene may have two sprites

# RGB in [-1, 1] like the pixels. The colours differ in hue, which stays visible under noise and texture.
COLOURS = {
    "red": (0.80, -0.60, -0.60),
    "green": (-0.60, 0.45, -0.60),
    "blue": (-0.60, -0.35, 0.85),
    "yellow": (0.85, 0.60, -0.70),
    "purple": (0.50, -0.65, 0.65),
}
STONES = {  # RGB of the backgrounds; nearly grey, so that they are not taken for a colour of a sprite
    "sand": (0.30, 0.24, 0.14),
    "ice": (0.10, 0.20, 0.30),
    "rose": (0.24, 0.14, 0.20),
    "slate": (-0.35, -0.42, -0.45),
    "granite": (0.05, 0.05, 0.05),
}
TEXTURES = (marble, stripes, felt)  # of sprites
RIM_WIDTH, RIM_OPACITY, RIM_BRIGHTNESS = 1.2, 0.45, -0.9  # the dark line along a sprite's outline; the width in pixels
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
STILL = "still"


@dataclass(frozen=True)
class Size:
    """Size of a clip.

    Attributes:
        frames: number of frames.
        height: pixels, a multiple of ``PATCH``.
        width: pixels, a multiple of ``PATCH``.
    """

    frames: int
    height: int
    width: int

    @classmethod
    def from_tokens(cls, frames: int, rows: int, columns: int) -> "Size":
        """Return the size of a clip of ``frames x rows x columns`` tokens."""
        return cls(frames, rows * PATCH, columns * PATCH)

    @property
    def tokens(self) -> int:
        """Number of tokens of the clip."""
        return self.frames * (self.height // PATCH) * (self.width // PATCH)


@dataclass(frozen=True)
class Subject:
    """What a prompt says of a sprite.

    Attributes:
        colour: a key of ``COLOURS``.
        shape: one of ``SHAPES``.
        direction: a key of ``DIRECTIONS``.
    """

    colour: str
    shape: str
    direction: str


@dataclass(frozen=True)
class Sprite(Subject):
    """One moving shape.

    Attributes:
        speed: pixels per frame.
        start: centre in frame 0, ``(x, y)`` in pixels.
    """

    speed: int
    start: tuple[int, int]

    def positions(self, frames: int) -> Tensor:
        """Return the centre in every frame, ``[frames, 2]`` as x, y in pixels."""
        step = torch.tensor(DIRECTIONS[self.direction]) * self.speed
        return torch.tensor(self.start) + torch.arange(frames)[:, None] * step


@dataclass(frozen=True)
class Scene:
    """Content of a clip.

    Attributes:
        sprites: one or two sprites of different colours; the last is drawn on top.
        drift: direction of the background's motion, a key of ``DIRECTIONS`` or ``STILL``.
        drift_speed: pixels per frame.
    """

    sprites: tuple[Sprite, ...]
    drift: str
    drift_speed: int

    def background_offsets(self, frames: int) -> Tensor:
        """Return the displacement of the background in every frame, ``[frames, 2]`` as x, y in pixels, never above 0:
        the frame then shows a window of the texture that does not reach across its edge."""
        step = torch.tensor(DIRECTIONS.get(self.drift, (0, 0))) * self.drift_speed
        offsets = torch.arange(frames)[:, None] * step
        return offsets - offsets.clamp(min=0).amax(0)


def random_scene(size: Size, rng: random.Random) -> Scene:
    """Return a random scene: one sprite, or in frames of at least ``MIN_SIDE_FOR_TWO`` pixels one or two."""
    count = rng.choice((1, 2)) if min(size.height, size.width) >= MIN_SIDE_FOR_TWO else 1
    colours = rng.sample(list(COLOURS), count)
    subjects = [Subject(colour, rng.choice(SHAPES), rng.choice(list(DIRECTIONS))) for colour in colours]
    return place(subjects, rng.choice((STILL,) * 6 + tuple(DIRECTIONS)), size, rng)


def place(subjects: Sequence[Subject], drift: str, size: Size, rng: random.Random) -> Scene:
    """Return a scene of one or two subjects at random places, so that the sprites stay inside the frame.

    Two sprites are placed so that they do not overlap in any frame; if 40 attempts fail, the attempt with the largest
    gap is used.
    """
    candidates = []
    for _ in range(40):
        sprites = tuple(_place_sprite(subject, size, rng) for subject in subjects)
        candidates.append(sprites)
        if min_gap(sprites, size.frames) > 0:
            break
    sprites = max(candidates, key=lambda sprites: min_gap(sprites, size.frames))
    return Scene(sprites, drift, drift_speed=PATCH)


def _place_sprite(subject: Subject, size: Size, rng: random.Random) -> Sprite:
    """Return a sprite at the highest speed at which its path fits into the frame: 4, 2 or 1 pixels per frame.

    With slow motion a blurred prediction costs little, and the model does not learn directions. A speed of a whole
    token keeps the texture aligned with the token grid.
    """
    axis = DIRECTIONS[subject.direction]
    room = (_extent(size, axis) - 2 * RADIUS) / max(1, size.frames - 1)
    speed = next((speed for speed in (PATCH, PATCH // 2) if speed <= room), 1)
    path = [component * speed * (size.frames - 1) for component in axis]
    start = tuple(_random_start(*span, rng) for span in zip((size.width, size.height), path, strict=True))
    return Sprite(subject.colour, subject.shape, subject.direction, speed, start)


def _extent(size: Size, axis: tuple[int, int]) -> int:
    return size.width if axis[0] else size.height


def _random_start(length: int, travel: int, rng: random.Random) -> int:
    """Return a start on the token grid for which ``RADIUS`` pixels around the path stay inside ``[0, length]``."""
    low, high = RADIUS - min(travel, 0), length - RADIUS - max(travel, 0)
    start = rng.uniform(low, high) if low < high else (low + high) / 2
    return PATCH * round(start / PATCH)


def min_gap(sprites: tuple[Sprite, ...], frames: int) -> float:
    """Return the smallest gap in pixels between two sprites over a clip of ``frames``; infinite for a single sprite."""
    if len(sprites) < 2:
        return float("inf")
    first, second = sprites
    distance = (first.positions(frames) - second.positions(frames)).float().norm(dim=1).min().item()
    return distance - 2 * RADIUS


def render(scene: Scene, size: Size, generator: torch.Generator) -> Tensor:
    """Return the video of a scene, ``[3, frames, height, width]`` in [-1, 1]."""
    video = _translate(_background_texture(size, generator), scene.background_offsets(size.frames), size)
    for sprite in scene.sprites:
        positions = sprite.positions(size.frames)
        foreground = _translate(_sprite_texture(sprite, size, generator), positions, size)
        video = torch.lerp(video, foreground, _opacity(sprite, positions, size))
    return video.clamp(-1, 1)


def _background_texture(size: Size, generator: torch.Generator) -> Tensor:
    """Return stone, ``[3, h, w]``. It exceeds the frame by the longest drift, so nothing repeats."""
    margin = PATCH * size.frames
    stone = list(STONES.values())[torch.randint(len(STONES), (), generator=generator)]
    return torch.tensor(stone)[:, None, None] + marble(size.height + margin, size.width + margin, generator)


def _sprite_texture(sprite: Sprite, size: Size, generator: torch.Generator) -> Tensor:
    """Return the surface of a sprite, ``[3, height, width]``: its colour, a texture, light from the upper left, a rim.

    The centre of the sprite is pixel (0, 0), with negative coordinates wrapped around.
    """
    y, x = (torch.fft.fftfreq(length, 1 / length)[:, None] for length in (size.height, size.width))
    light = -0.25 * ((x.T + y) / (2 * RADIUS)).clamp(-1, 1)
    texture = TEXTURES[torch.randint(len(TEXTURES), (), generator=generator)](2 * RADIUS, 2 * RADIUS, generator)
    texture = F.pad(texture, (0, size.width - 2 * RADIUS, 0, size.height - 2 * RADIUS)).roll((-RADIUS, -RADIUS), (1, 2))
    surface = torch.tensor(COLOURS[sprite.colour])[:, None, None] + light + texture
    rim = RIM_OPACITY * torch.exp(-(signed_distance(sprite.shape, x.T, y, RADIUS) + RIM_WIDTH).square())
    return torch.lerp(surface, torch.tensor(RIM_BRIGHTNESS), rim)


def _translate(texture: Tensor, positions: Tensor, size: Size) -> Tensor:
    """Move a texture ``[3, h, w]`` to ``positions [frames, 2]``; returns ``[3, frames, height, width]``."""
    columns = (torch.arange(size.width) - positions[:, :1]) % texture.shape[2]
    rows = (torch.arange(size.height) - positions[:, 1:]) % texture.shape[1]
    return texture[:, rows[:, :, None], columns[:, None, :]]


def _opacity(sprite: Sprite, positions: Tensor, size: Size) -> Tensor:
    """Return the alpha mask of a sprite, ``[frames, height, width]`` in [0, 1], with an edge about one pixel soft."""
    x = torch.arange(size.width)[None, None, :] - positions[:, 0, None, None]
    y = torch.arange(size.height)[None, :, None] - positions[:, 1, None, None]
    return torch.sigmoid(-3 * signed_distance(sprite.shape, x.float(), y.float(), RADIUS))


def signed_distance(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Return the signed distance in pixels from the outline of a shape centred at (0, 0), negative inside.

    The shape fills a box of ``2 * radius`` pixels along each side. ``x`` and ``y`` are broadcast.
    """
    if shape == "circle":
        return (x.square() + y.square()).sqrt() - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - radius
    sides = (2 * x.abs() - y - radius) / 5**0.5
    return torch.maximum(y - radius, sides)


def coverage(scene: Scene, size: Size) -> Tensor:
    """Return how much of each pixel the sprites cover, ``[frames, height, width]`` in [0, 1]."""
    opacities = [_opacity(sprite, sprite.positions(size.frames), size) for sprite in scene.sprites]
    return torch.stack(opacities).amax(0)


def make_clip(seed: int, size: Size, accept: Callable[[Scene], bool] = lambda scene: True) -> tuple[Scene, Tensor]:
    """Return a random scene and its video ``[3, frames, height, width]``, deterministic in the seed.

    Args:
        accept: scenes are drawn until this returns True.
    """
    rng = random.Random(seed)
    scene = random_scene(size, rng)
    while not accept(scene):
        scene = random_scene(size, rng)
    return scene, render(scene, size, torch.Generator().manual_seed(seed))
