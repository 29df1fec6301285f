"""Generate the tables of the README from the methods and the stored results.

``python -m dit_sparse.eval.report.readme`` rewrites README.md between ``<!-- table: name -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re

from . import comparison_tables, model_tables
from . import tables as result_tables
from .method_catalog import method_rows, setting_texts, short_source
from .tables import ROOT, markdown


def method_table() -> str:
    rows = method_rows()
    return markdown(
        ("method", "keeps", "settings", "paper"),
        (
            (
                f"[`{row['name']}`](dit_sparse/{row['file']})",
                row["summary"],
                ", ".join(f"`{text}`" for text in setting_texts(row)) or "-",
                f"[{short_source(row)}]({row['source']})",
            )
            for row in rows
        ),
    )


PAGES = ("README.md", "docs/benchmarks.md", "docs/kernels.md", "docs/models.md", "docs/routed.md")
TABLES = {
    "methods": method_table,
    "models": model_tables.summary,
    "families": model_tables.family_table,
    "features": model_tables.feature_table,
    "pipelines": model_tables.pipeline_table,
    "unsupported": model_tables.unsupported_table,
    "demo": result_tables.demo_table,
    "compare": comparison_tables.compare_tables,
    "branches": comparison_tables.branches_tables,
    "routed": comparison_tables.routed_tables,
    "study": result_tables.study_tables,
    "executors": result_tables.executor_table,
    "transformers": result_tables.transformer_table,
    "tail": result_tables.tail_table,
    "scaling": result_tables.scaling_table,
}


def update_tables(text: str) -> str:
    """Return the text of a page with all tables generated again."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(update_tables((ROOT / page).read_text()))
