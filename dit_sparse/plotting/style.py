"""Colours, axes and SVG output shared by all figures. Figures are built without pyplot and change no global setting."""

from __future__ import annotations

import io
import re
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text
from matplotlib.textpath import text_to_path
from matplotlib.typing import ColorType

TITLE_SIZE, TEXT_SIZE, SMALL_SIZE = 11.0, 9.0, 8.0  # points
MARGIN = 0.12  # inches around a figure
DPI = 144
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # 7 markers and 10 colours: 70 series before a pair repeats
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))


@dataclass(frozen=True)
class Theme:
    """Colours of a figure, ``#rrggbb``, all different.

    Attributes:
        paper, ink, muted, grid: background, text, secondary text, grid lines.
        empty, accent: colours of 0 and 1 in masks and heat maps; ``accent`` also draws sparse attention.
        highlight: the query in a mask.
        series: colours of lines, in order.
    """

    paper: str
    ink: str
    muted: str
    grid: str
    empty: str
    accent: str
    highlight: str
    series: tuple[str, ...]

    def css_variables(self) -> dict[str, str]:
        """Return the colours by the names of the CSS variables that `figure_to_svg` writes."""
        colors = asdict(self)
        series = {f"series-{number}": color for number, color in enumerate(colors.pop("series"))}
        return {f"--plot-{name}": color for name, color in (colors | series).items()}

    def color_map(self) -> LinearSegmentedColormap:
        """Return the colour map of values in 0..1."""
        return LinearSegmentedColormap.from_list("dit_sparse", [self.empty, self.accent])


LIGHT = Theme(
    paper="#fcfcfb", ink="#1d2430", muted="#5b6675", grid="#e3e6eb", empty="#e9ecf1", accent="#2a63a8",
    highlight="#dd5c33",
    series=("#2e69b2", "#ab4400", "#1d7d3e", "#7f4bb1", "#8b6000", "#007984", "#b13065", "#526f00", "#6e3d39",
            "#596475"),
)  # fmt: skip
DARK = Theme(
    paper="#171c23", ink="#e6eaf0", muted="#9aa6b5", grid="#2d3642", empty="#262e39", accent="#82b4f2",
    highlight="#ff8a5c",
    series=("#7db7ff", "#fe9563", "#77ca8a", "#cb99ff", "#d9ac5f", "#61c6d1", "#ff84b0", "#a6c66b", "#f0b7b2",
            "#aeb9cb"),
)  # fmt: skip


def contrast(color: ColorType, other: ColorType) -> float:
    """Return the contrast ratio of two colours by WCAG 2, 1 to 21; text requires 4.5."""
    srgb = np.array([to_rgb(color), to_rgb(other)])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    dark, light = sorted(linear @ (0.2126, 0.7152, 0.0722))
    return (light + 0.05) / (dark + 0.05)


def series_styles(names: Sequence[str], theme: Theme) -> dict[str, dict]:
    """Return the color, marker and linestyle of each name; no two of 70 share a colour and a marker."""
    styles = zip(cycle(theme.series), cycle(MARKERS), cycle(DASHES), strict=False)
    return {
        name: {"color": color, "marker": marker, "linestyle": dashes}
        for name, (color, marker, dashes) in zip(names, styles, strict=False)
    }


def new_figure(width: float, height: float, theme: Theme, title: str = "", notes: Sequence[str] = ()) -> Figure:
    """Return an empty figure of ``width`` x ``height`` inches, plus the lines of the title above and the notes below.

    Both wrap at the width of the figure.
    """
    room = width - 2 * MARGIN
    title = wrap(title, room, TITLE_SIZE, "bold")
    note = "\n".join(wrap(line, room, TEXT_SIZE) for line in notes)
    above, below = (MARGIN + _height(text, size) for text, size in ((title, TITLE_SIZE), (note, TEXT_SIZE)))
    total, left = height + above + below, MARGIN / width
    figure = Figure((width, total), DPI, facecolor=theme.paper, layout="constrained")
    figure.get_layout_engine().set(rect=(left, below / total, room / width, height / total), h_pad=0.02, w_pad=0.02)
    bold = {"size": TITLE_SIZE, "weight": "bold", "color": theme.ink}
    figure.text(left, 1 - MARGIN / total, title, **bold, va="top").set_in_layout(False)
    figure.text(left, MARGIN / total, note, size=TEXT_SIZE, color=theme.muted).set_in_layout(False)
    return figure


def _height(text: str, size: float) -> float:
    """Return the inches of lines of ``size`` points and a gap, 0 for no text."""
    return (1.25 * len(text.splitlines()) + 0.5) * size / 72 if text else 0


def style_axes(axes: Axes, theme: Theme, grid: str | None = None) -> None:
    """Set the colours of axes, remove the frame, and draw grid lines along ``grid``: "x", "y" or "both"."""
    axes.set_facecolor("none")
    axes.spines[:].set_visible(False)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=SMALL_SIZE, labelcolor=theme.muted, pad=5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=theme.muted, size=TEXT_SIZE)
    if grid:
        axes.grid(axis=grid, color=theme.grid, linewidth=0.8)


def wrap(text: str, width: float, size: float, weight: str = "normal") -> str:
    """Break the lines of a text of ``size`` points where they exceed ``width`` inches."""
    font = FontProperties(size=size, weight=weight)
    measure = lambda line: text_to_path.get_text_width_height_descent(line, font, ismath=False)[0] / 72
    lines = []
    for line in map(printable, text.splitlines()):
        characters = int(72 * width / (0.4 * size))  # of a narrow letter
        while characters > 1 and any(measure(part) > width for part in textwrap.wrap(line, characters)):
            characters -= 2
        lines += textwrap.wrap(line, max(characters, 1))
    return "\n".join(lines)


def printable(text: str) -> str:
    """Replace control characters, which XML does not allow."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def finish(figure: Figure) -> Figure:
    """Return the figure with every text drawn literally: dollar signs do not start a formula."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    return figure


def figure_to_svg(
    figure: Figure, theme: Theme = LIGHT, label: str = "", titles: Mapping[str, str] | None = None
) -> str:
    """Return a figure as an SVG element for an HTML page.

    Colours of ``theme`` become CSS variables with the colour as fallback, so one element serves a light and a dark
    page. Text stays text, in the font of the page. Artists whose gid begins with ``series-`` are grouped by gid; their
    labels can be focused by keyboard, other links only be clicked.

    Args:
        label: for screen readers.
        titles: a tooltip and an accessible name for the links of the figure, by address.
    """
    file = io.StringIO()
    # matplotlib derives ids from the salt: reproducible, and different for the figures of one page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label or "figure"}):
        figure.savefig(file, format="svg", facecolor="none", metadata={"Date": None})
    root = ET.fromstring(file.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.text, element.tail = (element.text or "").strip(), None
        attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        element.attrib = {name: _simplify(name, value, theme) for name, value in attributes.items()}
    series = _group_series(root)
    labels = {link for group in series for link in group.iter("a") if link.find("text") is not None}
    for link in root.iter("a"):
        link.attrib = {"href": link.get("href")} | ({} if link in labels else {"tabindex": "-1"})
        if title := (titles or {}).get(link.get("href")):
            link.set("aria-label", title)
            link.insert(0, ET.Element("title"))
            link[0].text = title
    root.attrib = {"viewBox": root.get("viewBox"), "class": "plot", "role": "group", "aria-label": label}
    return ET.tostring(root, encoding="unicode")


def figure_to_html(figure: Figure) -> str:
    """Return a figure for the ``_repr_html_`` of a notebook."""
    width = 100 * figure.get_figwidth()
    return f'<div style="max-width: {width:.0f}px; background: {LIGHT.paper}">{figure_to_svg(figure)}</div>'


def _simplify(name: str, value: str, theme: Theme) -> str:
    """Return an attribute with coordinates in hundredths of a point, the colours of the page and its font."""
    if name in ("href", "id"):
        return value
    value = re.sub(r" font-family: [^;]*;|rotate\(-0 [^)]*\)", "", value)
    for variable, color in theme.css_variables().items():
        value = value.replace(color, f"var({variable}, {color})")
    return re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", value)


def _group_series(root: ET.Element) -> list[ET.Element]:
    """Move the elements of each series into one group at the end; remove metadata, global styles and unused ids."""
    elements = list(root.iter())
    references = " ".join(value for element in elements for value in element.attrib.values() if "#" in value)
    groups: dict[str, ET.Element] = {}
    for parent in elements:
        for child in list(parent):
            gid = child.get("id", "")
            if child.tag in ("metadata", "style") or gid.startswith("series-"):
                parent.remove(child)
            if gid.startswith("series-"):
                groups.setdefault(gid, ET.Element("g", {"class": "series"})).append(child)
            if gid and f"#{gid}" not in references:
                del child.attrib["id"]
    root.extend(groups.values())
    return list(groups.values())
