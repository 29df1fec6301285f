"""A comparison as one HTML page that needs nothing but itself: pictures, tables, frames, conditions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path

from dit_sparse.output.files import atomic_write

from .scatter import Scatter, hues, line_of
from .tables import TIMED, clips_told, costs_like, unfinished

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6675; --line: #d9dee6; --paper: #ffffff; --card: #f6f8fa;
  --accent: #265da8; --warn: #b4541f; --tone: .54; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --soft: #9aa6b5; --line: #333d4a; --paper: #12161c; --card: #191f27; --accent: #7db0f0;
    --warn: #f0a070; --tone: .76; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 32px 20px 64px; max-width: 1400px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 8px; } h2 { font-size: 1.25rem; margin: 48px 0 8px; }
h3 { font-size: .95rem; color: var(--soft); margin: 24px 0 8px; }
p { max-width: 60rem; margin: 0 0 12px; } .soft, figcaption { color: var(--soft); } figcaption { font-size: .88rem; }
figure { margin: 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; }
.pair { display: grid; gap: 20px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr)); }
.wide { overflow-x: auto; } .wide + p { margin-top: 12px; } .hued { --own: oklch(var(--tone) .13 var(--hue)); }
.chart { display: block; width: 100%; min-width: 520px; font-size: 12px; fill: none; stroke-linejoin: round; }
.chart text { fill: var(--soft); } .frame { stroke: var(--line); } .frame text, .legend text { stroke: none; }
.frame .one { stroke: var(--soft); stroke-dasharray: 2 4; } .legend circle { fill: var(--soft); }
.chart > polyline { stroke: var(--own, var(--soft)); stroke-opacity: .35; }
.chart > .front { stroke: var(--ink); stroke-opacity: .08; stroke-width: 14; stroke-linecap: round; }
.lines circle { fill: var(--own, var(--soft)); stroke: var(--card); } .lines .leader { stroke: var(--own, var(--soft));
  opacity: .6; } .lines text { font: 11.5px ui-monospace, monospace; fill: var(--own, var(--ink)); stroke: var(--card);
  stroke-width: 3; paint-order: stroke; }
.lines g { transition: opacity .15s; } .lines:hover g:not(:hover) { opacity: .15; }
.lines g:hover :is(path, polyline) { stroke: var(--own, var(--soft)); stroke-width: 1.5; }
table { border-collapse: collapse; width: 100%; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 6px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead [colspan] { text-align: center; } thead th { white-space: normal; vertical-align: bottom; line-height: 1.25; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
th { color: var(--soft); font-weight: 600; } tbody th { padding-top: 20px; } tr:hover td { background: var(--card); }
tr.floor td { color: var(--soft); } .missed { color: var(--warn); } b { color: var(--accent); }
.range { width: 150px; height: 14px; vertical-align: middle; color: var(--own, var(--soft)); stroke: currentColor;
  fill: currentColor; }
.strips { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
.strips img { width: 100%; image-rendering: pixelated; border-radius: 4px; display: block; }
.maps { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); }
.maps .card { padding: 8px; } .maps table { table-layout: fixed; margin-top: 4px; }
.maps td { text-align: center; padding: 2px 0; border: 0; position: static; background: none; font-size: .75rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""


def write_page(result: dict, path: Path) -> None:
    with atomic_write(path) as draft:
        draft.write_text(page(result), encoding="utf-8")


def page(result: dict) -> str:
    """The page of what ``Comparison.run`` wrote."""
    rows = result["rows"]
    dense = [row for row in rows if row["method"] == "dense"]
    judged = [row for row in rows if row["quality"]]
    sections = [
        f"<h1>{escape(result['model'])}: sparse attention compared</h1><p class=soft>{escape(_told(result))}</p>",
        *([f"<p class=missed>{unfinished(result)}</p>"] if unfinished(result) else []),
        f"<h2>Quality against cost</h2><p class=soft>{_CHARTS}</p><div class=pair>",
        _chart(result, "density_run", "pairs computed, as a share of the dense run's", "Up and to the left is good."),
        _chart(result, "speedup", "denoising, times as fast as dense", "Up and to the right is good."),
        f"</div><h2>Every row</h2><div class=wide>{_table(rows)}</div><p class=soft>{_EXPLAINED} {TIMED}</p>",
        *(f"<p class=soft>{name} is not here: {escape(why)}</p>" for name, why in _missing(rows)),
        f"<h2>What they look like</h2><p class=soft>“{escape(result['prompts'][0])}”, seed 0, and the PSNR of this "
        f"clip.</p>{_grouped(rows, 'strips', _strip)}",
        "<h2>Attention kept, by layer and head</h2><p class=soft>Share of the softmax mass that falls on computed "
        f"pairs; a line is a layer, a column a head.</p>{_grouped(rows, 'maps', _map)}",
        *([f"<h2>Quality by itself</h2><div class=wide>{_quality(judged)}</div>"] if judged else []),
        f"<h2>Conditions</h2>{_conditions(result, dense)}",
    ]
    head = "<meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'>"
    title = f"<title>{escape(result['model'])}: sparse attention compared</title>"
    head = f"<head>{head}{title}<style>{STYLE}</style></head>"
    return f"<!doctype html><html lang=en>{head}<body>{''.join(sections)}</body></html>\n"


_CHARTS = (
    "Nearness to the dense video. A line joins the densities of a method, a larger mark is a higher density, and the "
    "pale band joins the rows that no other row beats in both. Point at a method to see it alone, with 95 % intervals; "
    "at a mark for its numbers."
)
_EXPLAINED = (
    "PSNR, SSIM and MS-SSIM compare with the dense video of the same prompt and seed; brackets and bars are a 95 % "
    "interval for the mean over prompts (bootstrap). Worst tenth: the mean of the lowest tenth of the clips. Over "
    "random: PSNR above random blocks of the same density, to .01. Error: relative error of the attention output on "
    "calls of a dense clip. Kept: share of the softmax mass on computed pairs. Planning: share of the attention time. "
    "Dense rows with fewer steps cost what the densities beside them cost, by pairs computed and the attention's share "
    "of the time. Bold: the nearest to dense of its density. Densities further than .01 from what was asked for are "
    "marked."
)


def _told(result: dict) -> str:
    return f"{clips_told(result)}, {', '.join(result['grids'])} tokens, {result['steps']} steps, {result['device']}"


def compared(result: dict) -> list[dict]:
    """The rows that can stand in a chart."""
    return [row for row in result["rows"] if row["psnr"] and row["psnr"]["mean"] is not None]


def _chart(result: dict, x: str, x_title: str, told: str) -> str:
    rows = compared(result)
    picture = Scatter(rows, x, "psnr").svg(x_title, "PSNR, dB", hues(result["rows"])) if rows else "Nothing to show."
    return f"<figure class=card><div class=wide>{picture}</div><figcaption>{told}</figcaption></figure>"


def _missing(rows: Sequence[dict]) -> Iterator[tuple[str, str]]:
    """Name of every metric that could not be taken, and why."""
    for name in ("psnr", "ssim", "ms_ssim", "lpips"):
        if why := next((row[name]["unavailable"] for row in rows if "unavailable" in (row[name] or ())), None):
            yield name.upper().replace("_", "-"), why


Column = tuple[str, Callable[[dict], str]]


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _between(row: dict) -> str:
    bounds = row["psnr"] and row["psnr"]["interval"]
    return f" <span class=soft>[{bounds[0]:.1f}, {bounds[1]:.1f}]</span>" if bounds else ""


def _density(row: dict) -> str:
    told = _number(row["density_achieved"], 3)
    return f"<span class=missed title='not what was asked for'>{told} !</span>" if row["density_hit"] is False else told


def _of(name: str, key: str, digits: int) -> Callable[[dict], str]:
    return lambda row: _number(row[name] and row[name].get(key), digits)


COLUMNS: tuple[Column, ...] = (
    ("density", _density),
    ("whole run", lambda row: _number(row["density_run"])),
    ("PSNR, dB", _of("psnr", "mean", 1)),
    ("worst tenth", _of("psnr", "worst_decile", 1)),
    ("over random", _of("over_random", "mean", 1)),
    ("SSIM", _of("ssim", "mean", 3)),
    ("MS-SSIM", _of("ms_ssim", "mean", 3)),
    ("LPIPS", _of("lpips", "mean", 3)),
    ("error", lambda row: _number(row["error"])),
    ("kept", lambda row: _number(row["retained"])),
    ("denoising", lambda row: f"{row['speedup']:.2f}x"),
    ("attention", lambda row: f"{row['attention_speedup']:.2f}x"),
    ("planning", lambda row: f"{row['planning_share']:.0%}"),
)
NEARER = {"PSNR, dB": max, "worst tenth": max, "SSIM": max, "MS-SSIM": max, "LPIPS": min, "error": min, "kept": max}


def _table(rows: Sequence[dict]) -> str:
    columns = [(name, told) for name, told in COLUMNS if any(told(row) != "-" for row in rows)]
    head = "".join(f"<th scope=col{' colspan=2' * (name == 'PSNR, dB')}>{name}</th>" for name, _ in columns)
    parts = [f"<table><thead><tr><th scope=col>row</th>{head}</tr></thead>"]
    bars, styles = _bars(rows), hues(rows)
    for title, group in _groups(rows):
        judged = [row for row in group if row["density_hit"] and row["method"] != "random_blocks"]
        best = {
            name: NEARER[name]((told(row) for row in judged if told(row) != "-"), key=float, default="")
            for name, told in columns
            if name in NEARER
        }
        parts.append(f"<tbody><tr><th scope=rowgroup colspan={len(columns) + 2}>{title}</th></tr>")
        for row in group:
            floor = " class=floor" if row["method"] in ("dense", "random_blocks") else ""
            parts.append(f"<tr{floor}><td>{escape(row['name'] + costs_like(row, rows))}</td>")
            for name, told in columns:
                cell = f"<b>{told(row)}</b>" if row in judged and told(row) == best.get(name) else told(row)
                if name == "PSNR, dB":
                    cell += f"{_between(row)}</td><td{styles.get(line_of(row), '')}>{bars(row)}"
                parts.append(f"<td>{cell}</td>")
            parts.append("</tr>")
        parts.append("</tbody>")
    return "".join(parts) + "</table>"


def _bars(rows: Sequence[dict]) -> Callable[[dict], str]:
    """Draws the mean PSNR of a row and its interval, all rows on one scale."""
    spreads = [row["psnr"] for row in rows if row["psnr"] and row["psnr"]["mean"] is not None]
    ends = [end for spread in spreads for end in (spread["interval"] or [spread["mean"]])]
    low, wide = min(ends, default=0), (max(ends, default=0) - min(ends, default=0)) or 1
    place = lambda value: f"{4 + 142 * (value - low) / wide:.1f}"

    def bar(row: dict) -> str:
        if row["psnr"] not in spreads:
            return ""
        start, end = map(place, row["psnr"]["interval"] or [row["psnr"]["mean"]] * 2)
        middle = f"<circle cx={place(row['psnr']['mean'])} cy=7 r=3 stroke=none />"
        return f"<svg class=range viewBox='0 0 150 14' aria-hidden=true><path d='M{start} 7H{end}'/>{middle}</svg>"

    return bar


def _groups(rows: Sequence[dict]) -> Iterator[tuple[str, list[dict]]]:
    """By the density asked for, the nearest to dense first."""
    near = lambda row: -math.inf if not row["psnr"] else -(row["psnr"]["mean"] or math.inf)
    for density in sorted({row["density_asked"] for row in rows}, key=lambda density: density or 0):
        group = [row for row in rows if row["density_asked"] == density]
        yield f"density {density:g}" if density else "dense, and methods at their own settings", sorted(group, key=near)


def _grouped(rows: Sequence[dict], kind: str, draw: Callable[[dict], str]) -> str:
    parts = ((title, "".join(map(draw, group))) for title, group in _groups(rows))
    return "".join(f"<h3>{title}</h3><div class={kind}>{drawn}</div>" for title, drawn in parts if drawn)


def _strip(row: dict) -> str:
    first = row["psnr"]["each"][0] if row["psnr"] else None
    told = escape(row["name"]) + ("" if first is None else f", {first:.1f} dB")
    alt = f"frames of {escape(row['name'], True)}"
    return (
        f"<figure><img alt='{alt}' src='data:image/webp;base64,{row['strip']}'><figcaption>{told}</figcaption></figure>"
    )


def _map(row: dict) -> str:
    if not row["mass"]:
        return ""
    few = len(row["mass"][0]) <= 6  # there is room for numbers
    cell = lambda value: (
        f"<td style='background:color-mix(in srgb, var(--accent) {value:.0%}, transparent)"
        f"{';color:var(--paper)' if value > 0.55 else ''}'{'' if few else f' title={value:.2f}'}>"
        f"{f'{value:.2f}' if few else ''}</td>"
    )
    lines = "".join(f"<tr>{''.join(map(cell, values))}</tr>" for values in row["mass"])
    return f"<figure class=card><figcaption>{escape(row['name'])}</figcaption><table>{lines}</table></figure>"


def _quality(rows: Sequence[dict]) -> str:
    """VBench's dimensions, as far as their weights were there; the rest with what is missing."""
    missing = {name: value["unavailable"] for name, value in rows[0]["quality"].items() if isinstance(value, dict)}
    names = [name for name in rows[0]["quality"] if name not in missing]
    head = "".join(f"<th scope=col>{name.replace('_', ' ')}</th>" for name in names)
    line = lambda row: "".join(f"<td>{row['quality'][name]:.4f}</td>" for name in names)
    ordered = [row for _, group in _groups(rows) for row in group]
    body = "".join(f"<tr><td>{escape(row['name'])}</td>{line(row)}</tr>" for row in ordered)
    told = "".join(f"<dt>{name.replace('_', ' ')}</dt><dd>{escape(why)}</dd>" for name, why in missing.items())
    return f"<table><tr><th scope=col>row</th>{head}</tr>{body}</table><dl class=soft>{told}</dl>"


def _conditions(result: dict, dense: Sequence[dict]) -> str:
    told = {
        "model": result["model"],
        "call": ", ".join(f"{key}={value}" for key, value in result["call"].items()) or "the pipeline's own",
        "schedule": ", ".join(f"{key}={value}" for key, value in result["schedule"].items()),
        "executor": result["executor"],
        "dense rows": ", ".join(f"{row['name']}: {row['seconds']:.1f} s" for row in dense),
        "device": result["device"],
        "versions": ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version),
        "commit": result["commit"] or "not from a checkout",
        "prompts": "; ".join(result["prompts"]),
    }
    return "<dl>" + "".join(f"<dt>{key}</dt><dd>{escape(str(value))}</dd>" for key, value in told.items()) + "</dl>"
