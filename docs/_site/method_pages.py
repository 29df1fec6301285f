"""Pages of the site for single methods, from the facts and the results that docs/methods.md is made from."""

from __future__ import annotations

import re
from dataclasses import fields

from dit_sparse.eval.report.comparison_tables import compare_conditions
from dit_sparse.eval.report.method_catalog import method_rows
from dit_sparse.eval.report.method_page import listed_name, method_section, stored_comparisons
from dit_sparse.eval.report.tables import markdown
from dit_sparse.methods import KINDS, METHODS

COLUMNS = ("row", "density", "PSNR (dB)", "SSIM", "denoising speedup", "attention speedup", "planning overhead")
SECTION = re.compile(r"^### (\w+)\n.*?(?=^##|\Z)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(((?:[\w./]*/)?methods\.md)?#(\w+)\)")


def navigation() -> list[dict]:
    """Return the pages of the methods by kind, as entries of the navigation."""
    return [{f"{kind}s".capitalize(): [{name: method_uri(name)} for name in KINDS[kind]]} for kind in KINDS]


def method_uri(name: str) -> str:
    return f"methods/{name}.md"


def link_to_method_pages(text: str, is_overview: bool) -> str:
    """Return a page whose links to sections of methods.md lead to the pages of the methods.

    Args:
        is_overview: whether the page is methods.md itself, which then has no sections of single methods.
    """

    def change(match: re.Match) -> str:
        page, name = match[1], match[2]
        if name not in METHODS or (page is None and not is_overview):
            return match[0]
        return f"]({(page or 'methods.md').removesuffix('.md')}/{name}.md)"

    return LINK.sub(change, SECTION.sub("", text) if is_overview else text)


def method_pages() -> dict[str, str]:
    """Return the Markdown of the page of every method, by its address."""
    return {method_uri(row["name"]): _page(row) for row in method_rows()}


def _page(row: dict) -> str:
    name = row["name"]
    heading, summary, *facts = method_section(row)
    facts = [text.replace("](../dit_sparse/", "](../../dit_sparse/") for text in facts]
    cls = METHODS[name]
    overview = f"[All {row['kind']}s](../methods.md#{row['kind']}s), with pictures of their masks."
    parts = [f"# {heading.lstrip('# ')}", f"{summary} {overview}", *facts, "## Use", _example(row)]
    if rows := _results(name):
        parts += ["## Measured", *rows]
    parts += ["## Settings", f"::: {cls.__module__}.{cls.__name__}\n    options: {{members: false}}"]
    return "\n\n".join(parts) + "\n"


def _example(row: dict) -> str:
    """Return code that uses the method; a correction is shown around another method."""
    name = row["name"]
    has_inner = "inner" in {field.name for field in fields(METHODS[name])}
    text = f"{name}(svg2)" if has_inner else f"{name}(weights=shapes-wan)" if row["kind"] == "gate" else name
    density = "" if name == "dense" else ", density=0.25"
    return f'```python\nwith ds.enable(pipe, "{text}"{density}) as run:\n    video = pipe(prompt).frames[0]\n```'


def _results(name: str) -> list[str]:
    """Return a table and its conditions for each stored comparison that contains the method."""
    parts = []
    for result in stored_comparisons():
        rows = [row for row in result["rows"] if listed_name(row["method"]) == name and row["psnr"]]
        if rows:
            columns = (
                "row",
                "density",
                "PSNR (dB)",
                "SSIM",
                "denoising speedup",
                "attention speedup",
                "planning overhead",
            )
            parts += [markdown(columns, map(_cells, rows)), compare_conditions(result)]
    return parts


def _cells(row: dict) -> tuple[str, ...]:
    interval = row["psnr"]["interval"]
    bounds = f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else ""
    return (
        f"`{row['name']}`",
        f"{row['density_achieved']:.2f}" if row["density_achieved"] is not None else "-",
        f"{row['psnr']['mean']:.1f}{bounds}",
        f"{row['ssim']['mean']:.3f}" if row["ssim"] else "-",
        f"{row['speedup']:.2f}x",
        f"{row['attention_speedup']:.2f}x",
        f"{row['planning_share']:.0%}",
    )
