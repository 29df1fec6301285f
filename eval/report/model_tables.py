"""Markdown tables of the supported models: from the families, and from ``families.json``, measured on tiny models."""

from __future__ import annotations

import json

from dit_sparse.pipelines.family import Family, all_families
from dit_sparse.pipelines.unsupported import UNSUPPORTED

from .tables import RESULTS, markdown

TEXT = {None: "-", "before": "before", "after": "after"}


def summary() -> str:
    """Return how many classes are supported, and the families by what they generate."""
    families = list(all_families())
    groups = [[family for family in families if family.images is images] for images in (False, True)]
    counts = [sum(len(family.transformers) for family in group) for group in groups]
    pipelines = sum(len(family.pipelines) for family in families)
    links = [", ".join(map(_link, group)) for group in groups]
    return (
        f"{sum(counts)} transformer classes of diffusers, used by {pipelines} pipelines.\n\n"
        f"- {counts[0]} for videos: {links[0]}\n"
        f"- {counts[1]} for images: {links[1]}"
    )


def family_table() -> str:
    """Return a row for every transformer class: its family, its text and what was measured."""
    result = json.loads((RESULTS / "cpu" / "families.json").read_text())
    rows = {row["transformer"]: row for row in result["rows"]}
    columns = ("transformer class", "family", "text", "dense", "density 1", "density 0.5", "fullgraph")
    table = markdown(
        columns,
        (
            (
                f"`{name}`",
                _link(family, "../"),
                TEXT[family.text],
                *_measured_cells(rows[name]),
            )
            for family in all_families()
            for name in family.transformers
        ),
    )
    versions = result["versions"]
    return f"{table}\n\ntorch {versions['torch']}, diffusers {versions['diffusers']}, commit {result['commit']}."


def feature_table() -> str:
    """Return a row for every feature of diffusers and a column for every tested class, and what happens together."""
    result = json.loads((RESULTS / "cpu" / "features.json").read_text())
    names = list(next(iter(result["cells"].values())))
    short = lambda name: name.removesuffix("Model").removesuffix("2D").removesuffix("3D").removesuffix("Transformer")
    rows = ((feature, *(cells[name] for name in names)) for feature, cells in result["cells"].items())
    versions = result["versions"]
    table = markdown(("feature", *map(short, names)), rows)
    return f"{table}\n\ntorch {versions['torch']}, diffusers {versions['diffusers']}, commit {result['commit']}."


def _link(family: Family, root: str = "") -> str:
    return f"[`{family.name}`]({root}pipelines/{family.module.replace('.', '/')}.py)"


def _measured_cells(row: dict) -> tuple[str, ...]:
    yes = lambda value: "yes" if value else "no"
    return yes(row["dense_equal"]), f"{row['difference']:.0e}", f"{row['density']:.3f}", yes(row["compiles"])


def pipeline_table() -> str:
    """Return the pipelines of every family."""
    rows = ((f"`{family.name}`", ", ".join(f"`{name}`" for name in family.pipelines)) for family in all_families())
    return markdown(
        ("family", "pipelines"), ((name, pipelines or "modular pipelines only") for name, pipelines in rows)
    )


def unsupported_table() -> str:
    """Return the classes that stay dense, with the reasons."""
    return markdown(
        ("transformer class", "why it stays dense"), ((f"`{name}`", why) for name, why in UNSUPPORTED.items())
    )
