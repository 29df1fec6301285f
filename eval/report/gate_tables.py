"""Markdown tables of trained gates, for docs/gates.md."""

from __future__ import annotations

import json

from dit_sparse.methods import method
from dit_sparse.methods.gates import GATES

from .comparison_tables import compare_table
from .tables import markdown, stored_results

PARTS = ("untrained", "trained", "best")


def weights_table(model: str = "shapes-wan") -> str:
    """Return the attention mass that the bundled gates of a model keep on held-out prompts, from their files."""
    rows = []
    for name in GATES:
        kept = method(f"{name}(weights={model})").stored_weights().training["kept_mass"]
        rows.append((f"`{name}`", *(f"{kept[part][density]:.3f}" for density in kept["best"] for part in PARTS)))
    columns = (f"{part}, {density.lstrip('0')}" for density in kept["best"] for part in PARTS)
    return markdown(("gate", *columns), rows)


def comparison_tables() -> str:
    """Return the table of every ``eval/results/*/compare-gates-*.json``."""
    return "\n\n".join(compare_table(json.loads(path.read_text())) for path in stored_results("compare-gates-*.json"))
