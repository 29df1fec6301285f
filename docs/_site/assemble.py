"""Assemble the sources of the documentation site in build/docs, for ``mkdocs build -f build/docs/mkdocs.yml``.

The pages of docs/ are written for readers of the repository. Here they get links within the site, and are joined by
pages made from the code: methods, commands, executed tutorials, and the files of the repository that pages link to.
"""

from __future__ import annotations

import re
import shutil

import yaml

from command_page import command_page
from method_pages import link_to_method_pages, method_pages, navigation
from repository_links import PAGES, PICTURES, ROOT, linked_files, repository_path, rewrite_links, site_uri, source_page
from tutorials import NOTEBOOKS, tutorial_files

BUILD = ROOT / "build" / "docs"
NOT_IN_SITE = ("_site", "examples")  # folders of docs/
MAPPED = ("kernels", "pipelines", "profiles", "eval")  # inside of the package dit_sparse when it is installed
ALONE = ("batch.md", "benchmarks.md", "evaluation.md")  # in their section: no list of its pages
INTERVAL = re.compile(r"(\d) (\[-?[\d.]+), (-?[\d.]+\])")
CODE_IN_TABLE = re.compile(r"(?<=\| )`[^`\n]*\\\|[^`\n]*`")  # GitHub needs a backslash there, Python-Markdown shows it
Files = dict[str, str | bytes]


def site_files() -> Files:
    """Return the content of all files of the site by their address: text of pages, bytes of other files."""
    files: Files = {**method_pages(), "reference/commands.md": command_page()}
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        files |= tutorial_files(notebook)
    for path in sorted((ROOT / "docs").rglob("*")):
        uri = path.relative_to(ROOT / "docs").as_posix()
        if path.is_file() and not uri.startswith(NOT_IN_SITE):
            files[uri] = path.read_text() if path.suffix == ".md" else path.read_bytes()
    files |= {uri: (ROOT / path).read_text() for path, uri in PAGES.items() if uri not in files}
    pages = [(repository_path(uri), text) for uri, text in files.items() if isinstance(text, str)]
    for path in sorted(linked_files(pages) - set(PAGES)):
        files[site_uri(path)] = _repository_file(path)
    return {uri: for_the_site(uri, text) if isinstance(text, str) else text for uri, text in files.items()}


def assemble() -> None:
    """Write the files of the site, the configuration of MkDocs and the package for the API reference."""
    files, pages = site_files(), BUILD / "pages"
    shutil.rmtree(pages, ignore_errors=True)
    for uri, content in files.items():
        file = pages / uri
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    config = yaml.safe_load((ROOT / "docs" / "_site" / "mkdocs.yml").read_text())
    (methods,) = (section["Methods"] for section in config["nav"] if "Methods" in section)
    methods += navigation()
    (BUILD / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    _copy_package()


def _copy_package() -> None:
    """Lay out the package as a wheel does, because Griffe reads files without importing them. It reads only folders
    with an ``__init__.py``."""
    package = BUILD / "python" / "dit_sparse"
    shutil.rmtree(package, ignore_errors=True)
    for folder in ("dit_sparse", *MAPPED):
        for file in (ROOT / folder).rglob("*.py"):
            copy = package / file.relative_to(ROOT / "dit_sparse" if folder == "dit_sparse" else ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
            (copy.parent / "__init__.py").touch()


def _repository_file(path: str) -> str | bytes:
    if path.endswith(PICTURES):
        return (ROOT / path).read_bytes()
    return (ROOT / path).read_text() if path.endswith(".md") else source_page(path)


def for_the_site(uri: str, text: str) -> str:
    """Return a page with links within the site, and with intervals of tables that stay on one line."""
    text = f"---\nhide: [navigation]\n---\n{text}" if uri in ALONE else text
    text = CODE_IN_TABLE.sub(lambda match: match[0].replace("\\|", "|"), text)
    text = INTERVAL.sub("\\1\N{NO-BREAK SPACE}\\2,\N{NO-BREAK SPACE}\\3", text)
    return rewrite_links(link_to_method_pages(text, uri == "methods.md"), uri)


if __name__ == "__main__":
    assemble()
