"""The report of a study as Markdown."""

from __future__ import annotations

from .ablation import Variant


def to_markdown(result: dict) -> str:
    """Return the report of a study: a table of the rows, and one of the variants of the ablated method."""
    number = lambda value, digits: "-" if value is None else f"{value:.{digits}f}"
    lines = ["| row | error of a step | density | with pooled terms | planning (s) | attention (s) | PSNR (dB) |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in result["rows"]:
        cost = row["density_achieved"] + row["tail_density"]
        cells = [row["name"], number(row["error"], 4), number(row["density_achieved"], 3), number(cost, 3)]
        cells += [number(row["planning_seconds"], 2), number(row["attention_seconds"], 2), number(row["psnr"], 2)]
        lines.append("| " + " | ".join(cells) + " |")
    clips = f"{len(result['prompts'])} prompts, {result['seeds']} seeds from {result['first_seed']}"
    lines += ["", f"{result['model']}, {clips}, {result['device']}, commit {result['commit']}."]
    if result["ablated"] is not None:
        lines += ["", *_ablation_table(result)]
    return "\n".join(lines) + "\n"


def _ablation_table(result: dict) -> list[str]:
    """Return the lines of a table with the errors of every variant relative to the method."""
    named = {(row["method"], row["density"]): row for row in result["rows"]}
    variants_ = [Variant(**one) for one in result["variants"]]
    whole = Variant("-", "whole", result["ablated"])
    lines = [
        "| part | left out or alone | density | error of a step | relative | PSNR (dB) |",
        "|---|---|---|---|---|---|",
    ]
    for density in result["densities"]:
        reference = named[whole.method, density]["error"]
        for one in (whole, *variants_):
            row = named[one.method, density]
            psnr = "-" if row["psnr"] is None else f"{row['psnr']:.2f}"
            cells = (one.part, one.kind, f"{density:g}", f"{row['error']:.4f}", f"{row['error'] / reference:.2f}", psnr)
            lines.append("| " + " | ".join(cells) + " |")
    return lines
