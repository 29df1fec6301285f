"""Procedural training clips: one or two textured shapes that move over a textured background.

Every texture is random, fine-grained, and moves rigidly with its object. To denoise a token, the model has to find the
same texture in other frames; this concentrates its attention.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PATCH = 4  # pixels along each side of one token
RADIUS = 12  # pixels; every shape fills a box of 24x24, because large objects remain visible at higher noise levels
MIN_SIDE_FOR_TWO = 64  # pixels along the shorter side of a frame from which a scene may have two sprites
MAX_FRAMES_FAST = 6  # clips of up to this many frames may have sprites at the highest speed
SHADING = 0.35  # relative brightness of a sprite's leading edge above its centre, and of its trailing edge below
GRAIN = 2  # pixels along each side of the medium texture grain

# RGB in [-1, 1] like the pixels. The colours differ in hue, which stays visible under noise and texture.
COLOURS = {
    "red": (0.80, -0.65, -0.65),
    "green": (-0.65, 0.45, -0.65),
    "blue": (-0.65, -0.45, 0.85),
    "yellow": (0.75, 0.65, -0.75),
    "purple": (0.55, -0.70, 0.65),
}
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
class Sprite:
    """One moving shape.

    Attributes:
        colour: a key of ``COLOURS``.
        shape: one of ``SHAPES``.
        direction: a key of ``DIRECTIONS``.
        speed: pixels per frame.
        start: centre in frame 0, ``(x, y)`` in pixels.
    """

    colour: str
    shape: str
    direction: str
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
        """Return the displacement of the background in every frame, ``[frames, 2]`` as x, y in pixels."""
        step = torch.tensor(DIRECTIONS.get(self.drift, (0, 0))) * self.drift_speed
        return torch.arange(frames)[:, None] * step


def random_scene(size: Size, rng: random.Random) -> Scene:
    """Return a random scene whose sprites stay inside the frame.

    Two sprites are placed so that they do not overlap in any frame; if 40 attempts fail, the attempt with the largest
    gap is used.
    """
    count = rng.choice((1, 2)) if min(size.height, size.width) >= MIN_SIDE_FOR_TWO else 1
    colours = rng.sample(list(COLOURS), count)
    candidates = []
    for _ in range(40):
        sprites = tuple(_random_sprite(colour, size, rng) for colour in colours)
        candidates.append(sprites)
        if _min_gap(sprites, size.frames) > 0:
            break
    sprites = max(candidates, key=lambda sprites: _min_gap(sprites, size.frames))
    drift = rng.choice((STILL,) * 6 + tuple(DIRECTIONS))
    return Scene(sprites, drift, drift_speed=PATCH)


def _random_sprite(colour: str, size: Size, rng: random.Random) -> Sprite:
    """Return a sprite at the highest speed at which its path fits into the frame.

    Speeds are 8 (only in clips of up to ``MAX_FRAMES_FAST`` frames), 4, 2 and 1 pixels per frame. With slow motion a
    blurred prediction costs little, and the model does not learn directions. Speeds of whole tokens keep the texture
    aligned with the token grid.
    """
    for speed in (2 * PATCH, PATCH, GRAIN, 1):
        travel = speed * (size.frames - 1)
        possible = [name for name, axis in DIRECTIONS.items() if travel + 2 * RADIUS <= _extent(size, axis)]
        if possible and (speed <= PATCH or size.frames <= MAX_FRAMES_FAST):
            break
    direction = rng.choice(possible or list(DIRECTIONS))
    path = [axis * travel for axis in DIRECTIONS[direction]]
    start = tuple(_random_start(*axis, rng) for axis in zip((size.width, size.height), path, strict=True))
    return Sprite(colour, rng.choice(SHAPES), direction, speed, start)


def _extent(size: Size, axis: tuple[int, int]) -> int:
    return size.width if axis[0] else size.height


def _random_start(length: int, travel: int, rng: random.Random) -> int:
    """Return a start on the token grid for which ``RADIUS`` pixels around the path stay inside ``[0, length]``."""
    low, high = RADIUS - min(travel, 0), length - RADIUS - max(travel, 0)
    start = rng.uniform(low, high) if low < high else (low + high) / 2
    return PATCH * round(start / PATCH)


def _min_gap(sprites: tuple[Sprite, ...], frames: int) -> float:
    """Return the smallest gap in pixels between two sprites over the clip; infinite for a single sprite."""
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
    """Return a nearly grey texture. It exceeds the frame by the longest drift, so nothing repeats."""
    margin = PATCH * size.frames
    return _random_texture(size.height + margin, size.width + margin, 0.20, 0.04, generator)


def _sprite_texture(sprite: Sprite, size: Size, generator: torch.Generator) -> Tensor:
    """Return the sprite's colour with texture, ``[3, height, width]``, brighter at the leading edge.

    The centre of the sprite is pixel (0, 0), with negative coordinates wrapped around.
    """
    colour = torch.tensor(COLOURS[sprite.colour])[:, None, None]
    y, x = (torch.fft.fftfreq(length, 1 / length)[:, None] for length in (size.height, size.width))
    ahead = DIRECTIONS[sprite.direction][0] * x.T + DIRECTIONS[sprite.direction][1] * y
    shade = 1 + SHADING * (ahead / RADIUS).clamp(-1, 1)
    return colour * shade + _random_texture(size.height, size.width, 0.16, 0.03, generator)


def _random_texture(height: int, width: int, contrast: float, chroma: float, generator: torch.Generator) -> Tensor:
    """Return random texture of three scales, ``[3, height, width]``.

    Most of the contrast is in single pixels: the 16 pixels of a token identify it among thousands, even under noise.

    Args:
        contrast: standard deviation scale of the brightness, which the channels share.
        chroma: standard deviation of each channel on its own.
    """
    fine = 0.8 * contrast * torch.randn(1, height, width, generator=generator)
    cells = (height // GRAIN, width // GRAIN)
    grain = 0.6 * contrast * torch.randn(1, *cells, generator=generator)
    grain = grain + chroma * torch.randn(3, *cells, generator=generator)
    coarse = 0.35 * contrast * torch.randn(1, 1, height // 12 + 2, width // 12 + 2, generator=generator)
    coarse = F.interpolate(coarse, size=(height, width), mode="bilinear")[0]
    return fine + grain.repeat_interleave(GRAIN, 1).repeat_interleave(GRAIN, 2) + coarse


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
