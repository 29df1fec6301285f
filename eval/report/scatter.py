"""Charts as SVG whose colours come from the page that they stand in, so they follow its light or dark."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice, pairwise

WIDTH, HEIGHT = 600, 540
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 44, 44
LETTER, LINE = 7.1, 13.0  # of a name: 11.5 pixels in a font of fixed width, so nobody has to measure it
TRIES = 4
WAYS = tuple(
    (math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)) for turn in (0, 8, -1, 1, 9, 7, -2, 2, 10, 6, -4, 4)
)

Point = tuple[float, float]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Mark:
    x: float
    y: float
    radius: float
    row: dict

    @property
    def at(self) -> Point:
        return self.x, self.y

    @property
    def box(self) -> Box:
        return self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius


@dataclass(frozen=True)
class Name:
    """A word, where it stands, and the ends of the line that leads to it, if it stands apart from its mark."""

    text: str
    box: Box
    leader: tuple[Point, ...] = ()


class Scatter:
    """A mark for every row at ``row[x]`` and the mean of ``row[y]``, larger for more density; the marks of a method are
    joined and named once. A pale band joins the rows that no other row beats in both."""

    def __init__(self, rows: Sequence[dict], x: str, y: str) -> None:
        self.x, self.y = x, y
        rows = sorted(rows, key=lambda row: row["density_run"])
        self.across = _Axis.around([row[x] for row in rows], 0.1, LEFT, WIDTH - RIGHT)
        self.up = _Axis.around([row[y]["mean"] for row in rows], 0.05, HEIGHT - BOTTOM, TOP)
        self.lines: dict[str, list[Mark]] = {}
        for row in rows:
            mark = Mark(self.across.place(row[x]), self.up.place(row[y]["mean"]), _radius(row["density_asked"]), row)
            self.lines.setdefault(line_of(row), []).append(mark)
        self.marks = [mark for line in self.lines.values() for mark in line]
        self.names = {name.text: name for name in named(self.lines)}

    def svg(self, x_title: str, y_title: str, colours: Mapping[str, str]) -> str:
        parts = [_frame(self.across, self.up, x_title, y_title), self._legend()]
        front = sorted((mark for mark in self.marks if self._unbeaten(mark)), key=lambda mark: mark.x)
        parts.append(f"<polyline class=front points='{_points(front)}'/>")
        parts += [f"<polyline points='{_points(line)}'{colours.get(name, '')}/>" for name, line in self.lines.items()]
        parts += ["<g class=lines>", *(self._line(name, colours.get(name, "")) for name in self.lines), "</g>"]
        label = escape(f"{y_title} against {x_title}", True)
        return f"<svg class=chart viewBox='0 0 {WIDTH} {HEIGHT}' role=img aria-label='{label}'>{''.join(parts)}</svg>"

    def _line(self, name: str, colour: str) -> str:
        """The marks and the name of a method; its line once more and its intervals, for the pointer to bring out."""
        line = self.lines[name]
        parts = [f"<polyline points='{_points(line)}'/>"]
        for mark in line:
            spread = mark.row[self.y]
            told = f"{mark.row['name']}: {spread['mean']:.1f}"
            if bounds := spread["interval"]:
                low, high = (max(self.up.place(bound), TOP) for bound in bounds)
                parts.append(f"<path d='M{mark.x:.1f} {low:.1f}V{high:.1f}'/>")
                told += f" [{bounds[0]:.1f}, {bounds[1]:.1f}]"
            title = f"<title>{escape(told)} at {mark.row[self.x]:.2f}</title>"
            parts.append(f"<circle cx={mark.x:.1f} cy={mark.y:.1f} r={mark.radius:.1f}>{title}</circle>")
        if word := self.names.get(name):
            if word.leader:
                parts.append(f"<polyline class=leader points='{_joined(word.leader)}'/>")
            parts.append(f"<text x={word.box[0]:.1f} y={word.box[3] - 3.5:.1f}>{escape(name)}</text>")
        return f"<g{colour}>{''.join(parts)}</g>"

    def _legend(self) -> str:
        asked = sorted({mark.row["density_asked"] for mark in self.marks} - {None}, reverse=True)
        parts = [f"<text x={WIDTH - RIGHT - 62 * len(asked)} y=18 text-anchor=end>asked-for density</text>"]
        for i, density in enumerate(asked, 1):
            x = WIDTH - RIGHT - 62 * i
            parts.append(
                f"<circle cx={x + 22} cy=14 r={_radius(density):.1f} /><text x={x + 32} y=18>{density:g}</text>"
            )
        return f"<g class=legend>{''.join(parts)}</g>" if len(asked) > 1 else ""

    def _unbeaten(self, mark: Mark) -> bool:
        """Whether nothing is better in both: a larger speed is better, and a smaller share of pairs."""
        sign = -1 if self.x == "density_run" else 1
        told = lambda one: (round(sign * one.row[self.x], 2), one.row[self.y]["mean"])
        better = lambda other: (
            told(other) != told(mark) and all(a >= b for a, b in zip(told(other), told(mark), strict=True))
        )
        return not any(map(better, self.marks))


def line_of(row: dict) -> str:
    """The name of the line that a row is on: its method's. Fewer steps are no density of dense attention."""
    return row["name"] if row["method"] == "dense" else row["method"]


def hues(rows: Sequence[dict]) -> dict[str, str]:
    """A hue, as an attribute, for every method with several rows: so many can be told apart."""
    lines = [line_of(row) for row in rows if row["method"] != "random_blocks"]
    several = sorted({line for line in lines if lines.count(line) > 1}, key=lines.index)
    return {line: f" class='hued' style='--hue:{360 * i // len(several)}'" for i, line in enumerate(several)}


def named(lines: Mapping[str, Sequence[Mark]]) -> Sequence[Name]:
    """A name for every line, at an end of it, where it covers no mark and no other name, and few lines. Those that find
    no room are placed before the others in the next try."""
    order = sorted(lines, key=lambda text: (lines[text][-1].y, text))
    most: Sequence[Name] = ()
    for _ in range(TRIES):
        most = max(most, names := list(_placed({text: lines[text] for text in order})), key=len)
        if len(names) == len(lines):
            break
        order.sort(key={name.text for name in names}.__contains__)
    return most


def _placed(lines: Mapping[str, Sequence[Mark]]) -> Iterator[Name]:
    taken = [mark.box for line in lines.values() for mark in line]
    free = lambda box: not any(_overlap(box, other) for other in taken)
    joins = [dot for line in lines.values() for dot in _dots([mark.at for mark in line], 5)]
    crossed = lambda name: sum(_overlap(name.box, dot) for dot in joins)
    for text, line in lines.items():
        # the first pixels of a leader may lie on another mark, or a mark below others had no name
        fitting = (name for name in _places(text, line) if all(map(free, [name.box, *_dots(name.leader, 2)[3:]])))
        if name := min(islice(fitting, 16), key=crossed, default=None):
            taken += [name.box, *_dots(name.leader, 2)]
            yield name


def _places(text: str, line: Sequence[Mark]) -> Iterator[Name]:
    """Where a name can stand inside the frame, nearest first."""
    for off in range(0, 200, 10):
        for mark in (line[-1], line[0])[: len(line)]:
            for right, down in WAYS:
                offset, half = mark.radius + 3 + off, LETTER * len(text) / 2
                x = mark.x + offset * right + half * ((right > 0.1) - (right < -0.1))
                y = mark.y + (offset + LINE / 2) * down
                box = (x - half, y - LINE / 2, x + half, y + LINE / 2)
                if box[0] > LEFT and box[1] > TOP and box[2] < WIDTH and box[3] < HEIGHT - BOTTOM:
                    yield Name(text, box, _leader(mark, box) if off else ())


def _leader(mark: Mark, box: Box) -> tuple[Point, Point]:
    """From the rim of a mark to the nearest point of a box."""
    end = min(max(mark.x, box[0] - 2), box[2] + 2), min(max(mark.y, box[1]), box[3])
    part = (mark.radius + 1.5) / math.dist(mark.at, end)
    return (mark.x + part * (end[0] - mark.x), mark.y + part * (end[1] - mark.y)), end


def _dots(ends: Sequence[Point], step: float) -> list[Box]:
    """Small boxes along a line."""
    found = []
    for (x, y), end in pairwise(ends):
        count = math.ceil(math.dist((x, y), end) / step)
        spots = [(x + (end[0] - x) * i / count, y + (end[1] - y) * i / count) for i in range(count)]
        found += [(across - 1, up - 1, across + 1, up + 1) for across, up in spots]
    return found


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


class _Axis:
    """A range with some room at its ends, over the pixels ``start`` to ``end``."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    @classmethod
    def around(cls, values: Sequence[float], room: float, start: float = 0, end: float = 1) -> _Axis:
        low, high = min(values), max(values)
        room = (high - low) * room or abs(high) / 4 or 1.0
        return cls(low - room, high + room, start, end)

    def place(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round numbers in the range."""
        rough = (self.high - self.low) / 7
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= rough * 0.999)
        return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def _frame(across: _Axis, up: _Axis, x_title: str, y_title: str) -> str:
    parts = [f"<path d='M{LEFT} {up.place(value):.1f}H{WIDTH - RIGHT}'/>" for value in up.ticks()]
    if across.low < 1 < across.high:
        parts.append(f"<path d='M{across.place(1):.1f} {TOP}V{HEIGHT - BOTTOM}' class=one />")
    for value in across.ticks():
        parts.append(f"<text x={across.place(value):.1f} y={HEIGHT - BOTTOM + 18} text-anchor=middle>{value:g}</text>")
    for value in up.ticks():
        parts.append(f"<text x={LEFT - 8} y={up.place(value) + 4:.1f} text-anchor=end>{value:g}</text>")
    middle = (WIDTH - RIGHT + LEFT) / 2
    parts.append(f"<text x={middle} y={HEIGHT - 6} text-anchor=middle>{escape(x_title)}</text>")
    parts.append(f"<text x=0 y=18>{escape(y_title)}</text>")
    return f"<g class=frame>{''.join(parts)}</g>"


def _radius(density: float | None) -> float:
    return 4 if density is None else min(2.5 + 6 * density, 6)


def _points(line: Sequence[Mark]) -> str:
    return _joined([mark.at for mark in line])


def _joined(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
