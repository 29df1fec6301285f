"""Lines on logarithmic axes, as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

INK, FAINT, GRID, PAPER = (32, 36, 44), (110, 116, 128), (228, 231, 236), (250, 250, 248)
COLOURS = (
    (38, 93, 168), (222, 92, 52), (46, 139, 87), (148, 82, 170), (196, 148, 20),
    (20, 150, 170), (200, 60, 110), (110, 85, 60), (90, 110, 125), (120, 170, 50),
)  # fmt: skip
SIZE = (900, 560)
LEFT, TOP, BOTTOM, LEGEND_LINE = 84, 84, 64, 25
SMOOTH = 3  # drawn so much larger, and shrunk: Pillow draws lines with hard edges

Point = tuple[float, float]


@dataclass(frozen=True)
class _Axis:
    """A logarithmic axis: ``low`` to ``high`` over the pixels ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float) -> _Axis:
        """With some room beside the values, and never less than a factor of 2."""
        low, high = min(values), max(values)
        room = max((high / low) ** 0.05, (2 * low / high) ** 0.5 if high < 2 * low else 1)
        return cls(low / room, high * room, start, end)

    def place(self, value: float) -> float:
        return self.start + (self.end - self.start) * math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        """Powers of ten, every second one or so where there are many; 1, 2 and 5 of each where there are few."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        step = max(1, (last - first) // 8)
        wanted = (1, 2, 5) if self.high / self.low < 200 else (1,)
        places = (digit * 10.0**power for power in range(first, last + 1, step) for digit in wanted)
        return [value for value in places if self.low <= value <= self.high]


@dataclass(frozen=True)
class _Style:
    colour: tuple[int, int, int]
    hollow: bool

    def marks(self, size: float) -> list[tuple[float, tuple[int, int, int]]]:
        """Sizes and colours of what is drawn, one over the other."""
        return [(size, self.colour)] + ([(size - 2, PAPER)] if self.hollow else [])


def log_log(lines: Mapping[str, Sequence[Point]], title: str, subtitle: str, x_label: str, y_label: str) -> Image.Image:
    """One coloured line for every name, hollow where the colours begin again, with a point at every value, and a legend
    in the order of their ends.

    Args:
        lines: ``(x, y)`` of each name, positive, in ascending order of x.

    Raises:
        ValueError: there is no point at all, or one that has no logarithm.
    """
    points = [point for line in lines.values() for point in line]
    if not points or min(min(point) for point in points) <= 0:
        raise ValueError("a chart with logarithmic axes needs points, and all of them above 0")
    ranked = sorted((name for name in lines if lines[name]), key=lambda name: -lines[name][-1][1])
    right = SIZE[0] - 48 - max(int(_font(13).getlength(name)) for name in ranked) - 28
    x = _Axis.around([point[0] for point in points], LEFT, right)
    y = _Axis.around([point[1] for point in points], SIZE[1] - BOTTOM, TOP)
    styles = {name: _Style(COLOURS[i % len(COLOURS)], i >= len(COLOURS)) for i, name in enumerate(lines)}
    picture = _drawn(lines, x, y, styles)
    draw = ImageDraw.Draw(picture)
    draw.text((24, 18), title, INK, _font(18))
    draw.text((24, 44), subtitle, FAINT, _font(13))
    for value in x.ticks():
        draw.text((x.place(value), SIZE[1] - BOTTOM + 8), short(value), INK, _font(12), anchor="ma")
    for value in y.ticks():
        draw.text((LEFT - 10, y.place(value)), short(value), INK, _font(12), anchor="rm")
    draw.text(((LEFT + right) / 2, SIZE[1] - 18), x_label, FAINT, _font(13), anchor="mm")
    _sideways(picture, y_label)
    _legend(draw, ranked, styles, right + 20)
    return picture


def short(value: float) -> str:
    """A number as an axis has room for it: 20k, 5M, 0.02."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _drawn(lines: Mapping[str, Sequence[Point]], x: _Axis, y: _Axis, styles: dict[str, _Style]) -> Image.Image:
    """The grid and the lines, without words. A line is wider than the later ones that share a place with it, so all are
    seen."""
    large = Image.new("RGB", (SMOOTH * SIZE[0], SMOOTH * SIZE[1]), PAPER)
    draw = ImageDraw.Draw(large)
    line = lambda points, fill, width: draw.line([SMOOTH * c for p in points for c in p], fill, round(SMOOTH * width))
    for value in x.ticks():
        line([(x.place(value), y.start), (x.place(value), y.end)], GRID, 1)
    for value in y.ticks():
        line([(x.start, y.place(value)), (x.end, y.place(value))], GRID, 1)
    line([(x.start, y.end), (x.start, y.start), (x.end, y.start)], FAINT, 1)
    drawn = {name: [(x.place(a), y.place(b)) for a, b in points] for name, points in lines.items()}
    later = [{(round(a), round(b)) for a, b in places} for places in drawn.values()]
    for name, places in drawn.items():
        own = later.pop(0)
        width = 2.2 + min(2.5, 14 / len(lines)) * sum(not own.isdisjoint(other) for other in later)
        for size, colour in styles[name].marks(width + styles[name].hollow):
            line(places, colour, size)
        for place in places:
            for size, colour in styles[name].marks(width + 1.4):
                draw.circle([SMOOTH * c for c in place], SMOOTH * size, colour)
    return large.resize(SIZE, Image.Resampling.LANCZOS)


def _legend(draw: ImageDraw.ImageDraw, names: Sequence[str], styles: dict[str, _Style], left: float) -> None:
    for number, name in enumerate(names):
        at = TOP + 8 + number * min(LEGEND_LINE, (SIZE[1] - TOP - BOTTOM) / len(names))
        draw.rectangle((left, at - 2, left + 18, at + 1), styles[name].colour)
        if styles[name].hollow:
            draw.rectangle((left, at - 1, left + 18, at), PAPER)
        draw.text((left + 28, at), name, INK, _font(13), anchor="lm")


def _sideways(picture: Image.Image, text: str) -> None:
    box = _font(13).getbbox(text)
    label = Image.new("RGB", (int(box[2]) + 4, int(box[3]) + 4), PAPER)
    ImageDraw.Draw(label).text((2, 0), text, FAINT, _font(13))
    label = label.rotate(90, expand=True)
    picture.paste(label, (14, (TOP + SIZE[1] - BOTTOM - label.height) // 2))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
