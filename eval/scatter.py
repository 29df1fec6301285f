"""Charts as SVG whose colours come from the page that they stand in, so they follow its light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 560, 400
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 14, 46
SHADES = ("#265da8", "#c2571a", "#2f8f5b", "#8a4bb3", "#b8932a", "#3aa0b5", "#b33a5e", "#6b7686")


def scatter(rows: Sequence[dict], x: str, y: str, x_title: str, y_title: str) -> str:
    """A mark and a name for every row at ``row[x]`` and the mean of ``row[y]``; a colour for every density asked for.
    The line joins the rows that no other row beats in both."""
    points = [(row[x], row[y]["mean"], row) for row in rows if row[y]["mean"] is not None]
    if not points:
        return "<p>Nothing to show.</p>"
    across, up = (_Axis.around([point[i] for point in points]) for i in (0, 1))
    place = lambda point: (
        LEFT + across.part(point[0]) * (WIDTH - LEFT - RIGHT),
        HEIGHT - BOTTOM - up.part(point[1]) * (HEIGHT - TOP - BOTTOM),
    )
    densities = sorted({row["density_asked"] for _, _, row in points if row["density_asked"] is not None})
    shade = lambda row: (
        SHADES[densities.index(row["density_asked"])] if row["density_asked"] in densities else SHADES[-1]
    )
    front = sorted((point for point in points if _unbeaten(point, points, x)), key=lambda point: point[:2])
    line = " ".join(f"{px:.1f},{py:.1f}" for px, py in map(place, front))
    parts = [_frame(across, up, x_title, y_title)]
    parts.append(f"<polyline points='{line}' fill=none stroke=currentColor stroke-opacity=.35 stroke-dasharray='4 4'/>")
    names = _Names()
    for point in sorted(points, key=lambda point: -point[1]):
        px, py = place(point)
        told = f"{point[2]['name']}: {point[1]:.1f} at {point[0]:.2f}"
        parts.append(
            f"<circle cx={px:.1f} cy={py:.1f} r=4.5 fill='{shade(point[2])}'><title>{escape(told)}</title></circle>"
        )
        parts.append(names.beside(px, py, point[2]["method"]))
    parts += [
        f"<circle cx={LEFT + 12} cy={TOP + 12 + 18 * i} r=4.5 fill='{SHADES[i]}'/>"
        f"<text x={LEFT + 22} y={TOP + 16 + 18 * i} font-size=12 fill=currentColor>density {density:g}</text>"
        for i, density in enumerate(densities)
        if len(densities) > 1
    ]
    label = f"{y_title} against {x_title}"
    return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role=img aria-label='{escape(label)}'>{''.join(parts)}</svg>"


def _unbeaten(point: tuple, points: Sequence[tuple], x: str) -> bool:
    """Whether nothing is better in both: a larger speed is better, and a smaller share of pairs."""
    sign = -1 if x == "density_run" else 1
    told = lambda one: (sign * one[0], one[1])
    better = lambda other: (
        told(other) != told(point) and all(a >= b for a, b in zip(told(other), told(point), strict=True))
    )
    return not any(map(better, points))


class _Axis:
    """A range with round ends and round steps."""

    def __init__(self, low: float, high: float, step: float) -> None:
        self.low, self.high, self.step = low, high, step

    @classmethod
    def around(cls, values: Sequence[float]) -> _Axis:
        low, high = min(values), max(values)
        rough = (high - low) / 5 or abs(high) / 5 or 1.0
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= rough * 0.999)
        return cls(math.floor(low / step - 0.1) * step, math.ceil(high / step + 0.1) * step, step)

    def part(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        return [self.low + i * self.step for i in range(round((self.high - self.low) / self.step) + 1)]


def _frame(across: _Axis, up: _Axis, x_title: str, y_title: str) -> str:
    parts, soft = [], "fill=currentColor fill-opacity=.7 font-size=12"
    for value in across.ticks():
        x = LEFT + across.part(value) * (WIDTH - LEFT - RIGHT)
        parts.append(f"<text x={x:.1f} y={HEIGHT - BOTTOM + 18} text-anchor=middle {soft}>{value:g}</text>")
    for value in up.ticks():
        y = HEIGHT - BOTTOM - up.part(value) * (HEIGHT - TOP - BOTTOM)
        parts.append(
            f"<line x1={LEFT} x2={WIDTH - RIGHT} y1={y:.1f} y2={y:.1f} stroke=currentColor stroke-opacity=.12></line>"
        )
        parts.append(f"<text x={LEFT - 8} y={y + 4:.1f} text-anchor=end {soft}>{value:g}</text>")
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts.append(f"<text x={(WIDTH + LEFT) / 2} y={HEIGHT - 8} text-anchor=middle {soft}>{escape(x_title)}</text>")
    parts.append(
        f"<text transform='translate(14 {middle}) rotate(-90)' text-anchor=middle {soft}>{escape(y_title)}</text>"
    )
    return "".join(parts)


class _Names:
    """Puts names beside their marks where they cover no other name; one that finds no room is left to its tooltip."""

    def __init__(self) -> None:
        self.taken: list[tuple[float, float, float, float]] = []

    def beside(self, x: float, y: float, name: str) -> str:
        width, height = 6.2 * len(name), 13
        for dx, dy in ((8, 4), (-8 - width, 4), (8, -8), (8, 16), (-8 - width, -8), (-8 - width, 16)):
            box = (x + dx, y + dy - height, x + dx + width, y + dy)
            if box[0] >= LEFT and box[2] <= WIDTH and not any(_overlap(box, other) for other in self.taken):
                self.taken.append(box)
                return f"<text x={x + dx:.1f} y={y + dy:.1f} font-size=11 fill=currentColor>{escape(name)}</text>"
        return ""


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
