"""A comparison as one HTML page that needs nothing but itself: pictures, tables, frames, conditions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

from .files import aside
from .scatter import scatter
from .table import clips_told

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6675; --line: #d9dee6; --paper: #ffffff; --card: #f5f7fa;
  --accent: #265da8; --warn: #b4541f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --soft: #9aa6b5; --line: #333d4a; --paper: #12161c; --card: #1b212a; --accent: #7db0f0;
    --warn: #f0a070; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 32px 20px 64px; max-width: 1280px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 4px; } h2 { font-size: 1.2rem; margin: 40px 0 8px; }
p { max-width: 46rem; } .soft, figcaption, caption { color: var(--soft); }
figure { margin: 0; } .pair { display: grid; gap: 20px; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; }
.wide, .card { overflow-x: auto; } svg { width: 100%; min-width: 440px; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 6px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
th { color: var(--soft); font-weight: 600; } tr.floor td { color: var(--soft); } .missed { color: var(--warn); }
.strips { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
.strips img { width: 100%; image-rendering: pixelated; border-radius: 4px; display: block; }
.maps { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); }
.maps table { table-layout: fixed; } .maps td, .maps th { text-align: center; padding: 2px; border: 0;
  position: static; background: none; font-size: .75rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""


def write_page(result: dict, path: Path) -> None:
    with aside(path) as draft:
        draft.write_text(page(result), encoding="utf-8")


def page(result: dict) -> str:
    """The page of what ``Comparison.run`` wrote."""
    rows = result["rows"]
    compared = [row for row in rows if row["psnr"] is not None]
    dense = [row for row in rows if row["method"] == "dense"]
    judged = [row for row in rows if row["quality"]]
    sections = [
        f"<h1>{escape(result['model'])}: sparse attention compared</h1><p class=soft>{escape(_told(result))}</p>",
        "<h2>Quality against cost</h2><div class=pair>"
        + _figure(
            scatter(compared, "density_run", "psnr", "pairs computed in the whole run", "PSNR, dB"),
            "Nearness to the dense video by the share of the query-key pairs of all steps. Up and to the left is good.",
        )
        + _figure(
            scatter(compared, "speedup", "psnr", "denoising, times as fast as dense", "PSNR, dB"),
            "The same by measured speed. Up and to the right is good; left of 1 is slower than dense attention.",
        )
        + "</div>",
        f"<h2>Every row</h2><div class=wide>{_table(rows)}</div><p class=soft>{_EXPLAINED}</p>",
        f"<h2>What they look like</h2><p class=soft>“{escape(result['prompts'][0])}”, seed 0.</p>{_strips(rows)}",
        "<h2>Attention kept, by layer and head</h2>"
        f"<p class=soft>Share of the softmax mass that falls on computed pairs.</p>{_maps(rows)}",
        *([f"<h2>Quality by itself</h2><div class=wide>{_quality(judged)}</div>"] if judged else []),
        f"<h2>Conditions</h2>{_conditions(result, dense)}",
    ]
    head = "<meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'>"
    title = f"<title>{escape(result['model'])}: sparse attention compared</title>"
    head = f"<head>{head}{title}<style>{STYLE}</style></head>"
    return f"<!doctype html><html lang=en>{head}<body>{''.join(sections)}</body></html>\n"


_EXPLAINED = (
    "PSNR, SSIM and MS-SSIM compare with the dense video of the same prompt and seed; brackets hold a 95 % interval "
    "for the mean over prompts (bootstrap). Worst tenth: the mean of the lowest tenth of the clips. Over random: PSNR "
    "above random blocks of the same density. Error: relative error of the attention output on calls of a dense clip. "
    "Planning: share of the attention time. Densities further than .01 from what was asked for are marked."
)


def _told(result: dict) -> str:
    return f"{clips_told(result)}, {', '.join(result['grids'])} tokens, {result['steps']} steps, {result['device']}"


def _figure(picture: str, caption: str) -> str:
    return f"<figure class=card>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


Column = tuple[str, Callable[[dict], str]]


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _between(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else f" <span class=soft>[{bounds[0]:.1f}, {bounds[1]:.1f}]</span>"


def _density(row: dict) -> str:
    told = _number(row["density_achieved"], 3)
    return f"<span class=missed title='not what was asked for'>{told} !</span>" if row["density_hit"] is False else told


def _of(name: str, key: str, digits: int) -> Callable[[dict], str]:
    return lambda row: _number(row[name] and row[name][key], digits)


def _psnr(row: dict) -> str:
    return "-" if not row["psnr"] else _number(row["psnr"]["mean"], 1) + _between(row["psnr"]["interval"])


COLUMNS: tuple[Column, ...] = (
    ("density", _density),
    ("whole run", lambda row: _number(row["density_run"])),
    (
        "PSNR, dB",
        lambda row: "-" if not row["psnr"] else _of("psnr", "mean", 1)(row) + _between(row["psnr"]["interval"]),
    ),
    ("worst tenth", _of("psnr", "worst_decile", 1)),
    ("over random", _of("over_random", "mean", 1)),
    ("SSIM", _of("ssim", "mean", 3)),
    ("MS-SSIM", _of("ms_ssim", "mean", 3)),
    ("error", lambda row: _number(row["error"])),
    ("kept", lambda row: _number(row["retained"])),
    ("denoising", lambda row: f"{row['speedup']:.2f}x"),
    ("attention", lambda row: f"{row['attention_speedup']:.2f}x"),
    ("planning", lambda row: f"{row['planning_share']:.0%}"),
)


def _table(rows: Iterable[dict]) -> str:
    head = "".join(f"<th scope=col>{name}</th>" for name, _ in COLUMNS)
    body = []
    for row in sorted(rows, key=_density_then_quality):
        floor = " class=floor" if row["method"] in ("dense", "random_blocks") else ""
        cells = "".join(f"<td>{told(row)}</td>" for _, told in COLUMNS)
        body.append(f"<tr{floor}><td>{escape(row['name'])}</td>{cells}</tr>")
    return f"<table><thead><tr><th scope=col>row</th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _density_then_quality(row: dict) -> tuple:
    return row["density_asked"] or 0, -(row["psnr"]["mean"] or 999 if row["psnr"] else 999)


def _strips(rows: Iterable[dict]) -> str:
    figures = (
        f"<figure><img alt='frames of {escape(row['name'], True)}' src='data:image/webp;base64,{row['strip']}'>"
        f"<figcaption>{escape(row['name'])}{_decibels(row)}</figcaption></figure>"
        for row in sorted(rows, key=_density_then_quality)
    )
    return f"<div class=strips>{''.join(figures)}</div>"


def _decibels(row: dict) -> str:
    first = row["psnr"]["each"][0] if row["psnr"] else None
    return "" if first is None else f", {first:.1f} dB"


def _maps(rows: Iterable[dict]) -> str:
    figures = (
        f"<figure class=card><figcaption>{escape(row['name'])}</figcaption>{_map(row['mass'])}</figure>"
        for row in sorted(rows, key=_density_then_quality)
        if row["mass"]
    )
    return f"<div class=maps>{''.join(figures)}</div>"


def _map(mass: Sequence[Sequence[float]]) -> str:
    line = lambda values: "".join(
        f"<td style='background:color-mix(in srgb, var(--accent) {value:.0%}, transparent)"
        f"{';color:var(--paper)' if value > 0.55 else ''}'>{value:.2f}</td>"
        for value in values
    )
    return f"<table>{''.join(f'<tr>{line(values)}</tr>' for values in mass)}</table>"


def _quality(rows: Sequence[dict]) -> str:
    """VBench's dimensions, as far as their weights were there; the rest with what is missing."""
    missing = {name: value["unavailable"] for name, value in rows[0]["quality"].items() if isinstance(value, dict)}
    names = [name for name in rows[0]["quality"] if name not in missing]
    head = "".join(f"<th scope=col>{name.replace('_', ' ')}</th>" for name in names)
    line = lambda row: "".join(f"<td>{row['quality'][name]:.4f}</td>" for name in names)
    body = "".join(
        f"<tr><td>{escape(row['name'])}</td>{line(row)}</tr>" for row in sorted(rows, key=_density_then_quality)
    )
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
