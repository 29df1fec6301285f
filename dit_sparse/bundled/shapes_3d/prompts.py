"""Prompts: the grammar of the solids, the scene of a prompt, random scenes, and the held-out scenes."""

import random
import re
import zlib
from dataclasses import dataclass

COLOURS = {
    "red": (0.76, 0.22, 0.20),
    "orange": (0.80, 0.47, 0.18),
    "yellow": (0.78, 0.68, 0.24),
    "green": (0.28, 0.60, 0.30),
    "teal": (0.22, 0.62, 0.62),
    "blue": (0.24, 0.40, 0.76),
    "purple": (0.54, 0.30, 0.68),
    "white": (0.74, 0.74, 0.72),
}
PATTERNS = ("plain", "striped", "checked", "dotted")
SHAPES = ("ball", "box", "torus", "cylinder", "cone", "gem")
BASES = ("box", "cylinder")  # shapes with a flat top, on which others stand
COUNTS = {"a": 1, "two": 2, "four": 4}
PLURALS = {"box": "boxes", "torus": "tori"}
HELD_OUT_SHARE = 8  # one scene in eight
_COUNT_WORDS = {number: word for word, number in COUNTS.items()}
_SINGULARS = {plural: shape for shape, plural in PLURALS.items()} | {f"{shape}s": shape for shape in SHAPES}


@dataclass(frozen=True)
class Part:
    """One kind of part: its colour, surface pattern and shape."""

    colour: str
    pattern: str
    shape: str

    def phrase(self, plural: bool = False) -> str:
        """Return the part in words, such as "striped red torus"."""
        shape = PLURALS.get(self.shape, f"{self.shape}s") if plural else self.shape
        return " ".join([*([] if self.pattern == "plain" else [self.pattern]), self.colour, shape])


@dataclass(frozen=True)
class Scene:
    """What a prompt describes.

    Attributes:
        part: the main part.
        count: how often it occurs: 1, 2 or 4. More than one stand on a base.
        base: the part below it, or None.
    """

    part: Part
    count: int = 1
    base: Part | None = None

    @property
    def prompt(self) -> str:
        """The scene in words, such as "a striped red torus on a blue box"."""
        plural = self.count > 1
        below = "" if self.base is None else f" on {_article(self.base.phrase())}"
        phrase = self.part.phrase(plural)
        return (f"{_COUNT_WORDS[self.count]} {phrase}" if plural else _article(phrase)) + below

    @property
    def is_held_out(self) -> bool:
        """Whether training excludes the scene. The choice depends on its words only, not on the proportions."""
        return zlib.crc32(self.prompt.encode()) % HELD_OUT_SHARE == 0


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def parse(prompt: str) -> Scene:
    """Return the scene of a prompt. Words that the grammar does not know are ignored.

    Raises:
        ValueError: the prompt names no coloured shape, or a base that is not a box or a cylinder, or several parts
            without a base.
    """
    words = [_SINGULARS.get(word, word) for word in re.findall("[a-z]+", prompt.lower())]
    split = words.index("on") if "on" in words else len(words)
    part, base = _find_part(words[:split]), _find_part(words[split + 1 :])
    count = next((COUNTS[word] for word in words[:split] if COUNTS.get(word, 1) > 1), 1)
    flat = base is not None and base.shape in BASES
    if part is None or (split < len(words) and not flat) or (count > 1 and not flat):
        raise ValueError(
            f"shapes-3d makes a {', '.join(SHAPES[:-1])} or {SHAPES[-1]} in {', '.join(COLOURS)}, alone or on a box or "
            f"cylinder, such as 'a striped red torus on a blue box' or 'four yellow balls on a white box'; the prompt "
            f"is {prompt[:80]!r}"
        )
    return Scene(part, count, base)


def _find_part(words: list[str]) -> Part | None:
    named = [next((word for word in words if word in known), None) for known in (COLOURS, PATTERNS[1:], SHAPES)]
    colour, pattern, shape = named
    return None if colour is None or shape is None else Part(colour, pattern or "plain", shape)


def random_scene(rng: random.Random) -> Scene:
    """Return a random scene: three quarters have a base, and the base has another colour."""
    part = Part(rng.choice(list(COLOURS)), rng.choice(PATTERNS), rng.choice(SHAPES))
    if rng.random() < 0.25:
        return Scene(part)
    colour = rng.choice([name for name in COLOURS if name != part.colour])
    return Scene(part, rng.choice((1, 1, 2, 4)), Part(colour, rng.choice(PATTERNS), rng.choice(BASES)))


def training_scene(rng: random.Random) -> Scene:
    """Return a random scene that is not held out."""
    while (scene := random_scene(rng)).is_held_out:
        pass
    return scene


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Return ``count`` different held-out scenes."""
    rng, scenes = random.Random(f"held out {seed}"), {}
    while len(scenes) < count:
        scene = random_scene(rng)
        if scene.is_held_out:
            scenes[scene.prompt] = scene
    return list(scenes.values())
