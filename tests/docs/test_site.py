"""Sources of the documentation site: pages of the methods, and links to files of the repository."""

from __future__ import annotations

import re

import pytest
import yaml

from assemble import for_the_site
from command_page import command_page
from dit_sparse import METHODS
from method_pages import link_to_method_pages, method_pages
from repository_links import ROOT, linked_files, map_links, repository_path, rewrite_links, site_uri, source_page

CONFIG = yaml.safe_load((ROOT / "docs" / "_site" / "mkdocs.yml").read_text())


def test_every_method_has_a_page():
    pages = method_pages()
    assert list(pages) == [f"methods/{name}.md" for name in METHODS]
    for name, text in zip(METHODS, pages.values(), strict=True):
        assert text.startswith(f"# {name}\n") and "## Settings" in text and f"{METHODS[name].__name__}\n" in text
        assert f'ds.enable(pipe, "{name}' in text


def test_links_to_methods_lead_to_their_pages():
    text = "[a](methods.md#radial), [b](../methods.md#svg2), [c](methods.md#patterns), [d](#radial)"
    expected = "[a](methods/radial.md), [b](../methods/svg2.md), [c](methods.md#patterns), [d](#radial)"
    assert link_to_method_pages(text, is_overview=False) == expected
    page = (ROOT / "docs" / "methods.md").read_text()
    overview = link_to_method_pages(page, is_overview=True)
    assert "](methods/radial.md)" in overview and "### radial" not in overview
    assert re.findall(r"^## .*", overview, re.MULTILINE) == re.findall(r"^## .*", page, re.MULTILINE)


@pytest.mark.parametrize(
    "path",
    ["docs/models.md", "docs/extending/gate.md", "CHANGELOG.md", "profiles/README.md", "dit_sparse/grid.py",
     "dit_sparse/assets/gates/README.md", "eval/results/cpu/scaling-own.png"],
)  # fmt: skip
def test_addresses_and_files_correspond(path):
    assert (ROOT / path).is_file()
    assert repository_path(site_uri(path)) == path


def test_links_to_the_repository_lead_into_the_site():
    text = "[a](../dit_sparse/grid.py) [b](../../profiles/README.md#x) [c](gone.py) [e](../models.md)"
    changed = rewrite_links(text, "extending/gate.md")
    assert "[b](../profiles.md#x) [c](gone.py) [e](../models.md)" in changed
    assert "[a](../dit_sparse/grid.py)" in changed, "docs/dit_sparse does not exist: MkDocs reports it"
    assert rewrite_links("[a](../dit_sparse/grid.py)", "models.md") == "[a](source/dit_sparse/grid.py.md)"
    assert rewrite_links("```\n[a](../dit_sparse/grid.py)\n```", "models.md").count("../dit_sparse") == 1


def test_cells_of_tables_are_shown_as_on_github():
    text = "| `radial\\|sink 0.25` | 21.9 [20.8, -3.0] |"
    assert for_the_site("x.md", text) == "| `radial|sink 0.25` | 21.9\u00a0[20.8,\u00a0-3.0] |"


def test_linked_files_are_found_through_other_files():
    found = linked_files([("docs/x.md", "[a](../dit_sparse/assets/gates/README.md) [b](usage.md) [c](../README.md)")])
    assert "dit_sparse/assets/gates/README.md" in found and not {"docs/usage.md", "README.md"} & found
    assert "`````python" in source_page("dit_sparse/grid.py")


def test_navigation_holds_every_page():
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    listed = pages(CONFIG["nav"])
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    tutorials = {f"tutorials/{path.stem}.md" for path in (ROOT / "docs" / "tutorials").glob("*.ipynb")}
    others = {"changelog.md", "contributing.md", "profiles.md", "reference/commands.md"}
    assert sorted(listed) == sorted(written | tutorials | others)


def test_relative_links_of_pages_exist():
    for page in [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        links: list[str] = []
        map_links(page.read_text(), lambda link, rest, links=links: links.append(link) or link + rest)
        missing = [link for link in links if not (page.parent / link).exists()]
        assert not missing, f"{page.relative_to(ROOT)} links to {missing}"


def test_commands_are_listed():
    page = command_page()
    assert "## `dit-sparse generate`" in page and "--density" in page and "### `dit-sparse bench attention`" in page
