"""Prompts: the grammar that describes a scene, the scene of a prompt, mismatched prompts, and the held-out pairs."""

import random
import re
import zlib
from dataclasses import replace

from .scenes import COLOURS, DIRECTIONS, SHAPES, STILL, Scene, Sprite, Subject

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


def parse(text: str) -> tuple[list[Subject], str]:
    """Return the subjects of a prompt and the drift of its background.

    Words that the grammar does not know are ignored.

    Raises:
        ValueError: the prompt does not name one or two coloured shapes, or not where they move.
    """
    foreground, _, background = " ".join(re.findall("[a-z]+", text.lower())).partition(" background")
    pattern = rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})s?\b"
    found = list(re.finditer(pattern, foreground))
    ends = [match.start() for match in found] + [len(foreground)]
    directions = [_first_direction(foreground[one.end() : end]) for one, end in zip(found, ends[1:], strict=True)]
    if not 1 <= len(found) <= 2 or None in directions:
        raise ValueError(
            f"shapes-wan-i2v draws one or two shapes ({', '.join(SHAPES)}) in {', '.join(COLOURS)} that move left, "
            f"right, up or down, such as 'a red circle moves right'; the prompt is {text[:80]!r}"
        )
    subjects = [Subject(*one.groups(), direction) for one, direction in zip(found, directions, strict=True)]
    return subjects, _first_direction(background) or STILL


def _first_direction(text: str) -> str | None:
    words = {word.removesuffix("wards").removesuffix("ward"): None for word in text.split()}
    return next((word for word in words if word in DIRECTIONS), None)


def is_held_out(scene: Scene) -> bool:
    """Return whether training excludes this pair of sprites.

    An eighth of all pairs is held out. The choice depends on colours, shapes and directions only, so a held-out pair
    is never trained on in any wording.
    """
    if len(scene.sprites) < 2:
        return False
    names = sorted(f"{s.colour} {s.shape} {s.direction}" for s in scene.sprites)
    return zlib.crc32("|".join(names).encode()) % 8 == 0


def make_mismatched(scene: Scene, rng: random.Random) -> Scene:
    """Return the scene with an error of motion, as the source of a mismatched prompt.

    The first frame shows everything but the motion, so only the motion is worth a mismatch: either two sprites that
    move in different directions exchange them, or every sprite gets another direction. The result is for `describe`
    only; it is not rendered.
    """
    sprites = scene.sprites
    if sprites[0].direction != sprites[-1].direction and rng.random() < 0.5:
        changed = [replace(sprites[0], direction=sprites[-1].direction)]
        changed += [replace(sprites[-1], direction=sprites[0].direction)]
    else:
        changed = [replace(s, direction=rng.choice([d for d in DIRECTIONS if d != s.direction])) for s in sprites]
    return replace(scene, sprites=tuple(changed))
