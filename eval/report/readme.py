"""Generate the tables of README.md and docs/ from the methods and the stored results.

``python -m dit_sparse.eval.report.readme`` rewrites the pages between ``<!-- table: name -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
from functools import partial

from dit_sparse.methods import KINDS

from . import comparison_tables, gate_tables, method_page, model_tables, preset_table
from . import tables as result_tables
from .tables import ROOT

PAGES = (
    "README.md",
    "docs/benchmarks.md",
    "docs/gates.md",
    "docs/kernels.md",
    "docs/methods.md",
    "docs/models.md",
    "docs/presets.md",
    "docs/routed.md",
)
TABLES = {
    "kinds": method_page.kind_table,
    "conditions": method_page.method_conditions,
    "presets": preset_table.preset_table,
    "preset_schedules": preset_table.schedule_table,
    "models": model_tables.summary,
    "families": model_tables.family_table,
    "features": model_tables.feature_table,
    "pipelines": model_tables.pipeline_table,
    "unsupported": model_tables.unsupported_table,
    "demo": result_tables.demo_table,
    "compare": comparison_tables.compare_tables,
    "branches": comparison_tables.branches_tables,
    "routed": comparison_tables.routed_tables,
    "second_model": comparison_tables.second_model_tables,
    "gate_weights": gate_tables.weights_table,
    "gate_videos": gate_tables.comparison_tables,
    "study": result_tables.study_tables,
    "executors": result_tables.executor_table,
    "transformers": result_tables.transformer_table,
    "tail": result_tables.tail_table,
    "scaling": result_tables.scaling_table,
} | {kind: partial(method_page.kind_section, kind) for kind in KINDS}


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
