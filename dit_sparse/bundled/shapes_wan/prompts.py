"""The language of the prompts, and which sentences are kept out of the training."""

import random
import zlib
from dataclasses import replace

from .scenes import COLOURS, DIRECTIONS, SHAPES, STILL

VERBS = ("moves", "slides", "glides", "travels", "is moving")
WHITHER = {
    "left": ("left", "to the left"),
    "right": ("right", "to the right"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
}
JOINS = (" while ", " and ", ", ")
STILL_BACKGROUNDS = (" over a still background", " on a still background")
DRIFTING_BACKGROUNDS = (" over a background drifting {}", " on a background drifting {}")


def words():
    """Every word that a prompt can contain, sorted."""
    phrases = [*VERBS, *JOINS, *STILL_BACKGROUNDS, *DRIFTING_BACKGROUNDS, *COLOURS, *SHAPES, *DIRECTIONS]
    phrases += [phrase for choices in WHITHER.values() for phrase in choices]
    text = " ".join([*phrases, "a the an"]).replace(",", " , ").replace("{}", " ")
    return sorted(set(text.split()))


def describe(scene, rng):
    """One of the many sentences for a scene; half of them mention the background, and the order is free."""
    parts = [_clause(sprite, rng) for sprite in scene.sprites]
    rng.shuffle(parts)
    return rng.choice(JOINS).join(parts) + (_background(scene.drift, rng) if rng.random() < 0.5 else "")


def plain(sprites):
    """The plainest sentence for some sprites: "a red circle moves right while a blue square moves up"."""
    return " while ".join(f"a {s.colour} {s.shape} moves {s.direction}" for s in sprites)


def _clause(sprite, rng):
    whither = rng.choice(WHITHER[sprite.direction])
    return f"a {sprite.colour} {sprite.shape} {rng.choice(VERBS)} {whither}"


def _background(drift, rng):
    if drift == STILL:
        return rng.choice(STILL_BACKGROUNDS)
    return rng.choice(DRIFTING_BACKGROUNDS).format(drift)


def held_out(scene):
    """Whether a pair of sprites belongs to the eighth of all pairs that training never sees, in any wording."""
    if len(scene.sprites) < 2:
        return False
    names = sorted(f"{s.colour} {s.shape} {s.direction}" for s in scene.sprites)
    return zlib.crc32("|".join(names).encode()) % 8 == 0


OTHER_WAY = {"left": "right", "right": "left", "up": "down", "down": "up"}
# Circles and squares differ in their corners only and are what is drawn for each other.
TAKEN_FOR = {
    "circle": ("square", "square", "triangle"),
    "square": ("circle", "circle", "triangle"),
    "triangle": ("circle", "square"),
}
MISTAKES = ("direction", "shape", "shape", "shape", "colours", "missing")


def mistold(scene, rng):
    """The scene for its words only, and those wrong: things move the other way, or have other shapes; of two, each has
    the other's colour, or one is not mentioned."""
    sprites, kind = scene.sprites, rng.choice(MISTAKES)
    first, last = sprites[0], sprites[-1]
    if kind == "missing" and len(sprites) > 1:
        wrong = [rng.choice(sprites)]
    elif kind == "colours" and (first.shape, first.direction) != (last.shape, last.direction):
        wrong = [replace(first, colour=last.colour), replace(last, colour=first.colour)]
    elif kind == "direction" or (kind != "shape" and rng.random() < 0.5):
        wrong = [replace(s, direction=OTHER_WAY[s.direction]) for s in sprites]
    else:
        wrong = [replace(s, shape=rng.choice(TAKEN_FOR[s.shape])) for s in sprites]
    return replace(scene, sprites=tuple(wrong))


def sentence(scene, seed):
    """`describe` with a seed of its own."""
    return describe(scene, random.Random(seed ^ 0x5EED))
