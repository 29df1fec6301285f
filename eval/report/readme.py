"""The tables of the README, made from the methods and from result files, never by hand.

``python -m dit_sparse.eval.report.readme`` rewrites what stands in README.md between ``<!-- table: name -->`` and
``<!-- end -->``.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import fields

from dit_sparse import METHODS, Method
from dit_sparse.methods import name_of
from dit_sparse.pipelines.family import FAMILIES

from . import tables as result_tables
from .tables import ROOT, markdown


def method_rows() -> list[dict]:
    """Name, summary, settings with defaults and source of every method."""
    return [
        {
            "name": name,
            "summary": _first_sentence(_paper(cls)),
            "settings": {f.name: _shown(f.default) for f in fields(cls) if f.name != "density"},
            "source": _source(_paper(cls)),
        }
        for name, cls in METHODS.items()
    ]


def _shown(default: object) -> object:
    return name_of(default) if isinstance(default, Method) else default


def _source(doc: str) -> str:
    """The address of the first paper that a docstring names, or the first address in it."""
    if paper := re.search(r"arXiv:(\d{4}\.\d{5})", doc):
        return f"https://arxiv.org/abs/{paper[1]}"
    return re.search(r"https://\S+[^\s.,]", doc)[0]


def method_table() -> str:
    rows = method_rows()
    return markdown(
        ("method", "keeps", "settings", "paper"),
        (
            (
                f"[`{row['name']}`](dit_sparse/methods/{row['name']}.py)",
                row["summary"],
                ", ".join(f"`{key}={value}`" for key, value in row["settings"].items()) or "-",
                f"[{row['source'].split('/', 3)[-1].removeprefix('abs/')}]({row['source']})",
            )
            for row in rows
        ),
    )


def model_table() -> str:
    families = (importlib.import_module(f"dit_sparse.pipelines.{name}").FAMILY for name in FAMILIES)
    where = {None: "cross-attention, stays dense", "before": "before the video", "after": "after the video"}
    return markdown(
        ("family", "pipelines", "text"),
        (
            (f"[`{f.name}`](pipelines/{f.name}.py)", ", ".join(f"`{name}`" for name in f.pipelines), where[f.text])
            for f in families
        ),
    )


def _paper(cls: type) -> str:
    """The docstring of the method's file, where its source is cited."""
    return importlib.import_module(cls.__module__).__doc__


def _first_sentence(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".")


TABLES = {
    "methods": method_table,
    "models": model_table,
    "demo": result_tables.demo_table,
    "compare": result_tables.compare_tables,
    "branches": result_tables.branches_tables,
    "executors": result_tables.executor_table,
    "transformers": result_tables.transformer_table,
    "scaling": result_tables.scaling_table,
}


def rewritten(text: str) -> str:
    """The README with every table made anew."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(rewritten(readme.read_text()))
