"""Procedural clips: textured shapes that cross a textured, drifting background.

Every texture is random and fine-grained, but travels rigidly with the thing it belongs to. Whoever denoises such a
clip has to find the same grain in other frames, and that is what makes the attention of the model concentrated.
"""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F

CELL = 4  # pixels along each side of one token
RADIUS = 12  # pixels; every shape fills a box of 24: what shows through noise grows with the area
ROOM_FOR_TWO = 64  # pixels along the shorter side
SHORT = 6  # frames; in clips up to this length objects may be fast
LIT = 0.35  # how much brighter the front of an object is than its middle, and how much darker its back
GRAIN = 2  # pixels along each side of the coarser grains of texture

# Colours lie in [-1, 1] like the pixels; they differ in hue, which survives noise and texture.
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
    """Extent of a clip: frames and pixels; height and width are multiples of `CELL`."""

    frames: int
    height: int
    width: int

    @classmethod
    def of_tokens(cls, frames, rows, columns):
        return cls(frames, rows * CELL, columns * CELL)

    @property
    def tokens(self):
        return self.frames * (self.height // CELL) * (self.width // CELL)


@dataclass(frozen=True)
class Sprite:
    """One shape: where its centre starts (x, y in pixels) and how far it goes each frame."""

    colour: str
    shape: str
    direction: str
    speed: int
    start: tuple[int, int]

    def path(self, frames):
        """Centre of the sprite in every frame, (frames, 2) as x, y in pixels."""
        step = torch.tensor(DIRECTIONS[self.direction]) * self.speed
        return torch.tensor(self.start) + torch.arange(frames)[:, None] * step


@dataclass(frozen=True)
class Scene:
    sprites: tuple[Sprite, ...]
    drift: str
    drift_speed: int

    def background_path(self, frames):
        """Displacement of the background in every frame, (frames, 2) as x, y in pixels."""
        step = torch.tensor(DIRECTIONS.get(self.drift, (0, 0))) * self.drift_speed
        return torch.arange(frames)[:, None] * step


def random_scene(size, rng):
    """A scene of one or two differently coloured sprites whose whole paths stay inside the frame."""
    count = rng.choice((1, 2)) if min(size.height, size.width) >= ROOM_FOR_TWO else 1
    colours = rng.sample(list(COLOURS), count)
    candidates = []
    for _ in range(40):
        pair = tuple(_random_sprite(colour, size, rng) for colour in colours)
        candidates.append(pair)
        if _clearance(pair, size.frames) > 0:
            break
    sprites = max(candidates, key=lambda pair: _clearance(pair, size.frames))
    drift = rng.choice((STILL,) * 6 + tuple(DIRECTIONS))
    return Scene(sprites, drift, drift_speed=CELL)


def _random_sprite(colour, size, rng):
    """A sprite whose path fits into the frame, fast if it can be, on the grid of the tokens.

    From frame to frame it goes as far as its own radius, or half as far in longer clips: the less it moved, the less
    a blurred guess would lose against knowing the direction. Whole tokens keep its grains together.
    """
    for speed in (2 * CELL, CELL, GRAIN, 1):
        travel = speed * (size.frames - 1)
        roomy = [name for name, axis in DIRECTIONS.items() if travel + 2 * RADIUS <= _extent(size, axis)]
        if roomy and (speed <= CELL or size.frames <= SHORT):
            break
    direction = rng.choice(roomy or list(DIRECTIONS))
    path = [axis * travel for axis in DIRECTIONS[direction]]
    start = tuple(_random_start(*axis, rng) for axis in zip((size.width, size.height), path, strict=True))
    return Sprite(colour, rng.choice(SHAPES), direction, speed, start)


def _extent(size, axis):
    return size.width if axis[0] else size.height


def _random_start(length, travel, rng):
    """A start such that `RADIUS` pixels around the path stay inside, on a corner of tokens."""
    low, high = RADIUS - min(travel, 0), length - RADIUS - max(travel, 0)
    start = rng.uniform(low, high) if low < high else (low + high) / 2
    return CELL * round(start / CELL)


def _clearance(sprites, frames):
    """Smallest gap in pixels between the outlines of two sprites over the clip; infinite for a single one."""
    if len(sprites) < 2:
        return float("inf")
    first, second = sprites
    distance = (first.path(frames) - second.path(frames)).float().norm(dim=1).min().item()
    return distance - 2 * RADIUS


def draw(scene, size, generator):
    """Render a scene: (3, frames, height, width) in [-1, 1]. The last sprite is on top."""
    video = _place(_background_texture(size, generator), scene.background_path(size.frames), size)
    for sprite in scene.sprites:
        path = sprite.path(size.frames)
        skin = _place(_sprite_texture(sprite, size, generator), path, size)
        cover = _cover(sprite, path, size)
        video = torch.lerp(video, skin, cover)
    return video.clamp(-1, 1)


def _background_texture(size, generator):
    """Nearly grey grain, larger than the frame by the longest drift, so that nothing repeats."""
    margin = CELL * size.frames
    return _texture(size.height + margin, size.width + margin, 0.20, 0.04, generator)


def _sprite_texture(sprite, size, generator):
    """The colour, shaded from a dark back to a bright front, and grain on it; its middle is at pixel 0, 0."""
    colour = torch.tensor(COLOURS[sprite.colour])[:, None, None]
    y, x = (torch.fft.fftfreq(length, 1 / length)[:, None] for length in (size.height, size.width))
    ahead = DIRECTIONS[sprite.direction][0] * x.T + DIRECTIONS[sprite.direction][1] * y
    shade = 1 + LIT * (ahead / RADIUS).clamp(-1, 1)
    return colour * shade + _texture(size.height, size.width, 0.16, 0.03, generator)


def _texture(height, width, contrast, chroma, generator):
    """Random grain of (3, height, width): `contrast` shared by the channels, `chroma` of each one alone.

    Most of it is a pixel wide: sixteen numbers make a token unmistakable among thousands, even through noise.
    """
    fine = 0.8 * contrast * torch.randn(1, height, width, generator=generator)
    cells = (height // GRAIN, width // GRAIN)
    grain = 0.6 * contrast * torch.randn(1, *cells, generator=generator)
    grain = grain + chroma * torch.randn(3, *cells, generator=generator)
    coarse = 0.35 * contrast * torch.randn(1, 1, height // 12 + 2, width // 12 + 2, generator=generator)
    coarse = F.interpolate(coarse, size=(height, width), mode="bilinear")[0]
    return fine + grain.repeat_interleave(GRAIN, 1).repeat_interleave(GRAIN, 2) + coarse


def _place(texture, path, size):
    """Move a texture along a path: (3, h, w) and (frames, 2) to (3, frames, height, width)."""
    columns = (torch.arange(size.width) - path[:, :1]) % texture.shape[2]
    rows = (torch.arange(size.height) - path[:, 1:]) % texture.shape[1]
    return texture[:, rows[:, :, None], columns[:, None, :]]


def _cover(sprite, path, size):
    """Opacity of a sprite, (frames, height, width): 1 inside, 0 outside, a soft edge of about a pixel."""
    x = torch.arange(size.width)[None, None, :] - path[:, 0, None, None]
    y = torch.arange(size.height)[None, :, None] - path[:, 1, None, None]
    return torch.sigmoid(-3 * outside(sprite.shape, x.float(), y.float(), RADIUS))


def outside(shape, x, y, radius):
    """Signed distance in pixels from the outline of the shape that fills a box of two radii, negative inside."""
    if shape == "circle":
        return (x.square() + y.square()).sqrt() - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - radius
    sides = (2 * x.abs() - y - radius) / 5**0.5
    return torch.maximum(y - radius, sides)


def clip(seed, size, accept=lambda scene: True):
    """A random scene and its video, the same for the same seed; scenes are drawn until `accept` likes one."""
    rng = random.Random(seed)
    scene = random_scene(size, rng)
    while not accept(scene):
        scene = random_scene(size, rng)
    return scene, draw(scene, size, torch.Generator().manual_seed(seed))
