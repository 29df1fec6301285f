"""The page of all methods, docs/methods.md, from their classes, docstrings, pictures and stored results."""

from __future__ import annotations

import json
from collections.abc import Iterator

from dit_sparse.methods import KINDS, kind_of

from .comparison_tables import compare_conditions
from .method_catalog import kind_summary, method_rows, setting_texts, short_source
from .tables import markdown, stored_results

DENSITIES = (0.15, 0.25)  # of the comparison
PICTURES = "images/methods"  # from docs/


def kind_table() -> str:
    """Return a row for every kind with its methods, which link to their sections of docs/methods.md."""
    links = lambda kind: ", ".join(f"[`{name}`](docs/methods.md#{name})" for name in KINDS[kind])
    summary = lambda kind: kind_summary(kind).partition(": ")[2]
    return markdown(("kind", "what it is", "methods"), ((kind, summary(kind), links(kind)) for kind in KINDS))


def kind_section(kind: str) -> str:
    """Return the picture of the masks of a kind, a table of its methods, and a section for each method."""
    rows = method_rows([kind])
    lines = [f"![Masks]({PICTURES}/{kind}.png)", _overview(rows)]
    for row in rows:
        lines += method_section(row)
    return "\n\n".join(lines)


def method_conditions() -> str:
    """Return the conditions of the measured numbers on the page."""
    notes = []
    for path in stored_results("planning*.json"):
        result = json.loads(path.read_text())
        shape = f"{result['tokens']:,} tokens ({result['grid']}), {result['heads']} heads x {result['dim']}"
        rounds = min(row["rounds"] for row in result["rows"] if "rounds" in row)
        notes.append(
            f"Planning: {shape}, density {result['density']:g}, medians of {rounds} interleaved rounds; "
            f"{result['device']}, torch {result['versions']['torch']}, commit {result['commit']}."
        )
    notes += [f"PSNR: {compare_conditions(result)}" for result in stored_comparisons()]
    return "\n\n".join(notes)


def _overview(rows: list[dict]) -> str:
    shares, psnr = _planning_shares(), _fidelity()
    columns = ("method", "paper", "planning, measured", *(f"PSNR at {density:g} (dB)" for density in DENSITIES))
    cells = (
        (
            f"[`{row['name']}`](#{row['name']})",
            f"[{short_source(row)}]({row['source']})",
            shares.get(row["name"], "-"),
            *(psnr.get((row["name"], density), "-") for density in DENSITIES),
        )
        for row in rows
    )
    return markdown(columns, cells)


def method_section(row: dict) -> Iterator[str]:
    yield f"### {row['name']}"
    yield f"{row['summary']}."
    cited = row["paper"]
    title = f'"{cited["title"]}", ' if cited["title"] else ""
    authors = f"{cited['authors']}, " if cited["authors"] else ""
    settings = ", ".join(f"`{text}`" for text in setting_texts(row)) or "none"
    yield "\n".join(
        [
            f"- Paper: {authors}{title}[{short_source(row)}]({row['source']}).",
            f"- Settings: {settings}. Source: [{row['file'].rpartition('/')[2]}](../dit_sparse/{row['file']}).",
            f"- Needs: {', '.join(row['needs']) or 'nothing'}.",
            f"- Planning: {row['planning'] or '-'}",
        ]
    )
    differences = [text.replace("``", "`").replace(" * ", " \\* ") for text in row["differences"]]
    if len(differences) == 1:
        yield f"Differs from the authors: {differences[0]}"
    else:
        yield "\n".join(["Differs from the authors:", "", *(f"- {text}" for text in differences)])


def _planning_shares() -> dict[str, str]:
    """Return the measured planning times by method, of the last stored result."""
    texts: dict[str, str] = {}
    for path in stored_results("planning*.json"):
        for row in json.loads(path.read_text())["rows"]:
            if row.get("static"):
                texts[row["method"]] = "once"
            elif "why_not" not in row:
                is_cheaper = row["later"] < 0.7 * row["first"] - 0.001
                texts[row["method"]] = f"{row['first']:.1%}" + (f", later {row['later']:.1%}" if is_cheaper else "")
    return texts


def _fidelity() -> dict[tuple[str, float], str]:
    """Return the mean PSNR and its interval by method and density."""
    texts: dict[tuple[str, float], str] = {}
    for result in stored_comparisons():
        for row in result["rows"]:
            if row["psnr"] and row["density_asked"]:
                low, high = row["psnr"]["interval"] or (None, None)
                interval = "" if low is None else f" [{low:.1f}, {high:.1f}]"
                texts.setdefault(
                    (listed_name(row["method"]), row["density_asked"]), f"{row['psnr']['mean']:.1f}{interval}"
                )
    return texts


def listed_name(method: str) -> str:
    """Return the name of a method on the page: gates are listed with the weights that they were compared with."""
    name = method.partition("(")[0]
    return name if kind_of(name) == "gate" else method


def stored_comparisons() -> list[dict]:
    """Return the stored comparisons of the page, the preferred ones first."""
    paths = [path for name in ("compare-papers.json", "compare.json") for path in stored_results(name)]
    return [json.loads(path.read_text()) for path in paths]
