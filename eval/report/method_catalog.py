"""Facts about every method for `dit-sparse methods` and the docs, read from its class and the docstring of its file."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import MISSING, fields

from dit_sparse import METHODS, Method
from dit_sparse.methods import KINDS, kind_of, name_of
from dit_sparse.notation.syntax import write

AUTHORS = r"((?:(?:[A-Z]\.[- ]?)+ ?[^\W\d_][\w'’-]+(?:, and |, | and )?)+(?: et al\.)?),?\s*$"
NUMBER = r"arXiv:(\d{4}\.\d{4,5})"
TITLE_AND_NUMBER = rf"\"([^\"]+)\"[^\"]{{0,40}}?{NUMBER}"
NEEDS = {"needs_values": "values", "needs_lse": "log-sum-exp"}  # by attribute of the class
NEEDED_FILES = {"weights": "gate weights", "profile": "profile"}  # by name of a setting


def method_rows(kinds: Sequence[str] = ()) -> list[dict]:
    """Return the facts about every method, in the order of their kinds.

    Args:
        kinds: only methods of these kinds; empty: all.

    Returns:
        For each method ``name``, ``kind``, ``file``, ``summary`` (one sentence), ``settings`` with their defaults,
        ``needs`` (see `needs`), ``planning`` (its cost), ``differences`` (from the authors), ``paper`` (see `paper`)
        and ``source``, the address of the paper.

    Raises:
        ValueError: there is no such kind.
    """
    if unknown := next((kind for kind in kinds if kind not in KINDS), None):
        raise ValueError(f"there is no kind {unknown[:60]!r}; there are {', '.join(KINDS)}")
    return [_row(name, cls) for name, cls in METHODS.items() if not kinds or kind_of(name) in kinds]


def _row(name: str, cls: type[Method]) -> dict:
    doc = file_docstring(cls)
    cited = paper(doc)
    return {
        "name": name,
        "kind": kind_of(name),
        "file": "/".join(cls.__module__.split(".")[1:]) + ".py",
        "summary": _first_sentence(doc),
        "settings": {f.name: _value(f.default) for f in fields(cls) if f.name != "density"},
        "needs": needs(cls),
        "planning": _paragraph(r"^Planning: ", doc),
        "differences": differences(doc),
        "paper": cited,
        "source": cited["url"],
    }


def needs(cls: type[Method]) -> list[str]:
    """Return what a method needs besides queries, keys and the grid: "values" and "log-sum-exp" of the attention call,
    a "profile", "gate weights", without which a gate has the parameters of an untrained scorer."""
    names = {f.name for f in fields(cls)}
    has_defaults = all(f.default is not MISSING or f.default_factory is not MISSING for f in fields(cls))
    one = cls() if has_defaults else cls
    listed = [text for attribute, text in NEEDS.items() if getattr(one, attribute) is True]
    return listed + [text for setting, text in NEEDED_FILES.items() if setting in names]


def paper(doc: str) -> dict:
    """Return ``title``, ``authors``, ``arxiv`` and ``url`` of the first paper in a docstring; None for what it lacks.

    Without a paper, ``url`` is the first address in the docstring.
    """
    doc = " ".join(doc.split())
    if found := re.search(TITLE_AND_NUMBER, doc):
        authors = re.search(AUTHORS, doc[: found.start()])
        title, number = found[1].rstrip(","), found[2]
        return {
            "title": title,
            "authors": authors and authors[1],
            "arxiv": number,
            "url": f"https://arxiv.org/abs/{number}",
        }
    found = re.search(rf"(?:{NUMBER})|https://\S+[^\s.,]", doc)
    url = f"https://arxiv.org/abs/{found[1]}" if found[1] else found[0]
    return {"title": None, "authors": None, "arxiv": found[1], "url": url}


def differences(doc: str) -> list[str]:
    """Return what a method does differently from its authors: the items of the list in a docstring, or one sentence."""
    text = _paragraph(r"^Differs from the authors:?\s*", doc, joined=False)
    items = re.split(r"^- ", text, flags=re.MULTILINE)
    return [" ".join(item.split()) for item in items if item.strip()]


def setting_texts(row: dict) -> list[str]:
    """Return the settings of a method as they are written in its text, such as ``sink=false``."""
    return [f"{key}={value if isinstance(value, str) else write(value)}" for key, value in row["settings"].items()]


def short_source(row: dict) -> str:
    """Return the arXiv number of a method's paper, or else its address without the server."""
    return row["paper"]["arxiv"] or row["source"].split("/", 3)[-1]


def kind_summary(kind: str) -> str:
    """Return the docstring of a kind, such as "Scorers: methods that rank ...", without the full stop."""
    return _first_sentence(importlib.import_module(f"dit_sparse.methods.{kind}s").__doc__)


def file_docstring(cls: type) -> str:
    """Return the docstring of a method's file, which cites its source."""
    return importlib.import_module(cls.__module__).__doc__


def _value(default: object) -> object:
    return name_of(default) if isinstance(default, Method) else default


def _paragraph(start: str, doc: str, joined: bool = True) -> str:
    """Return the text after a start, up to the next empty line; "" without it."""
    found = re.search(rf"{start}(.*?)(?=\n\n|\Z)", doc, re.MULTILINE | re.DOTALL)
    text = found[1] if found else ""
    return " ".join(text.split()) if joined else text


def _first_sentence(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".").replace("``", "`")
