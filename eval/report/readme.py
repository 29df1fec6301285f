"""Generate the tables of the README from the methods and the stored results.

``python -m dit_sparse.eval.report.readme`` rewrites README.md between ``<!-- table: name -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import fields

from dit_sparse import METHODS, Method
from dit_sparse.methods import kind_of, name_of
from dit_sparse.notation.syntax import write

from . import model_tables
from . import tables as result_tables
from .tables import ROOT, markdown


def method_rows() -> list[dict]:
    """Return name, summary, settings with defaults, and source of every method."""
    return [
        {
            "name": name,
            "kind": kind_of(name),
            "file": "/".join(cls.__module__.split(".")[1:]) + ".py",
            "summary": _first_sentence(_file_docstring(cls)),
            "settings": {f.name: _value(f.default) for f in fields(cls) if f.name != "density"},
            "source": _source(_file_docstring(cls)),
        }
        for name, cls in METHODS.items()
    ]


def _value(default: object) -> object:
    return name_of(default) if isinstance(default, Method) else default


def setting_texts(row: dict) -> list[str]:
    """Return the settings of a method as they are written in its text, such as ``sink=false``."""
    return [f"{key}={value if isinstance(value, str) else write(value)}" for key, value in row["settings"].items()]


def _source(doc: str) -> str:
    """Return the address of the first paper in a docstring, or else the first address."""
    if paper := re.search(r"arXiv:(\d{4}\.\d{5})", doc):
        return f"https://arxiv.org/abs/{paper[1]}"
    return re.search(r"https://\S+[^\s.,]", doc)[0]


def method_table() -> str:
    rows = method_rows()
    return markdown(
        ("method", "keeps", "settings", "paper"),
        (
            (
                f"[`{row['name']}`](dit_sparse/{row['file']})",
                row["summary"],
                ", ".join(f"`{text}`" for text in setting_texts(row)) or "-",
                f"[{row['source'].split('/', 3)[-1].removeprefix('abs/')}]({row['source']})",
            )
            for row in rows
        ),
    )


def _file_docstring(cls: type) -> str:
    """Return the docstring of a method's file, which cites its source."""
    return importlib.import_module(cls.__module__).__doc__


def _first_sentence(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".")


PAGES = ("README.md", "docs/benchmarks.md", "docs/kernels.md", "docs/models.md", "docs/routed.md")
TABLES = {
    "methods": method_table,
    "models": model_tables.summary,
    "families": model_tables.family_table,
    "features": model_tables.feature_table,
    "pipelines": model_tables.pipeline_table,
    "unsupported": model_tables.unsupported_table,
    "demo": result_tables.demo_table,
    "compare": result_tables.compare_tables,
    "branches": result_tables.branches_tables,
    "routed": result_tables.routed_tables,
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
