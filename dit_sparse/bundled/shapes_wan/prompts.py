"""Prompts: the grammar that describes a scene, mismatched prompts, and the pairs held out from training."""

import random
import zlib
from dataclasses import replace

from .scenes import COLOURS, DIRECTIONS, SHAPES, STILL, Scene, Sprite

VERBS = ("moves", "slides", "glides", "travels", "is moving")
DIRECTION_PHRASES = {
    "left": ("left", "to the left"),
    "right": ("right", "to the right"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
}
CONJUNCTIONS = (" while ", " and ", ", ")
STILL_BACKGROUNDS = (" over a still background", " on a still background")
DRIFTING_BACKGROUNDS = (" over a background drifting {}", " on a background drifting {}")


def vocabulary() -> list[str]:
    """Return every word that a prompt can contain, sorted."""
    phrases = [*VERBS, *CONJUNCTIONS, *STILL_BACKGROUNDS, *DRIFTING_BACKGROUNDS, *COLOURS, *SHAPES, *DIRECTIONS]
    phrases += [phrase for choices in DIRECTION_PHRASES.values() for phrase in choices]
    text = " ".join([*phrases, "a the an"]).replace(",", " , ").replace("{}", " ")
    return sorted(set(text.split()))


def describe(scene: Scene, rng: random.Random) -> str:
    """Return a random description of a scene: random wording and order, the background in half of them."""
    parts = [_sprite_phrase(sprite, rng) for sprite in scene.sprites]
    rng.shuffle(parts)
    return rng.choice(CONJUNCTIONS).join(parts) + (_background_phrase(scene.drift, rng) if rng.random() < 0.5 else "")


def describe_seeded(scene: Scene, seed: int) -> str:
    """Return the random description of a scene that belongs to a clip's seed."""
    return describe(scene, random.Random(seed ^ 0x5EED))


def _sprite_phrase(sprite: Sprite, rng: random.Random) -> str:
    direction = rng.choice(DIRECTION_PHRASES[sprite.direction])
    return f"a {sprite.colour} {sprite.shape} {rng.choice(VERBS)} {direction}"


def _background_phrase(drift: str, rng: random.Random) -> str:
    if drift == STILL:
        return rng.choice(STILL_BACKGROUNDS)
    return rng.choice(DRIFTING_BACKGROUNDS).format(drift)


def is_held_out(scene: Scene) -> bool:
    """Return whether training excludes this pair of sprites.

    An eighth of all pairs is held out. The choice depends on colours, shapes and directions only, so a held-out pair
    is never trained on in any wording.
    """
    if len(scene.sprites) < 2:
        return False
    names = sorted(f"{s.colour} {s.shape} {s.direction}" for s in scene.sprites)
    return zlib.crc32("|".join(names).encode()) % 8 == 0


OPPOSITES = {"left": "right", "right": "left", "up": "down", "down": "up"}
# A circle and a square differ only in their corners and are confused most, so each is the more frequent replacement.
SHAPE_REPLACEMENTS = {
    "circle": ("square", "square", "triangle"),
    "square": ("circle", "circle", "triangle"),
    "triangle": ("circle", "square"),
}
MISMATCHES = ("direction", "shape", "shape", "shape", "colours", "missing")


def make_mismatched(scene: Scene, rng: random.Random) -> Scene:
    """Return the scene with one kind of error, as the source of a mismatched prompt.

    All directions are reversed, all shapes are replaced, the colours of two sprites are exchanged, or one of two
    sprites is missing. The result is for `describe` only; it is not rendered.
    """
    sprites, kind = scene.sprites, rng.choice(MISMATCHES)
    first, last = sprites[0], sprites[-1]
    if kind == "missing" and len(sprites) > 1:
        changed = [rng.choice(sprites)]
    elif kind == "colours" and (first.shape, first.direction) != (last.shape, last.direction):
        changed = [replace(first, colour=last.colour), replace(last, colour=first.colour)]
    elif kind == "direction" or (kind != "shape" and rng.random() < 0.5):
        changed = [replace(s, direction=OPPOSITES[s.direction]) for s in sprites]
    else:
        changed = [replace(s, shape=rng.choice(SHAPE_REPLACEMENTS[s.shape])) for s in sprites]
    return replace(scene, sprites=tuple(changed))
