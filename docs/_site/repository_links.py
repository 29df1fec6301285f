"""Links of the documentation that leave docs/: linked files of the repository become pages and files of the site."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = {  # files outside of docs/ that are pages of the navigation
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "profiles/README.md": "profiles.md",
    "README.md": "index.md",
}
PICTURES = (".png", ".gif", ".svg", ".jpg", ".webp", ".mp4")
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?(?: [^)]*)?\))")
FENCED = re.compile(r"^(```.*?^```[^\n]*$)", re.MULTILINE | re.DOTALL)


def site_uri(path: str) -> str:
    """Return the address in the site, as a source of MkDocs, of a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}" if path.endswith((".md", *PICTURES)) else f"source/{path}.md"


def repository_path(uri: str) -> str:
    """Return the file of the repository that a page of the site was made from: the inverse of `site_uri`."""
    path = next((path for path, page in PAGES.items() if page == uri and page != "index.md"), None)
    if path is None and uri.startswith("source/"):
        path = uri.removeprefix("source/")
        path = path if (ROOT / path).is_file() else path.removesuffix(".md")
    return path or f"docs/{uri}"


def map_links(markdown: str, change: Callable[[str, str], str]) -> str:
    """Return a page with the relative links outside of code blocks changed.

    Args:
        change: returns the new link for a path and the rest of the link, such as ``"#anchor"``.
    """
    parts = FENCED.split(markdown)
    parts[::2] = [LINK.sub(lambda match: match[1] + change(match[2], match[3]), part) for part in parts[::2]]
    return "".join(parts)


def rewrite_links(markdown: str, uri: str) -> str:
    """Return the Markdown of a page with relative links to files of the repository changed to links within the site."""
    folder = Path(repository_path(uri)).parent

    def change(link: str, rest: str) -> str:
        path = os.path.normpath(folder / link)
        if not (ROOT / path).is_file():
            return link + rest  # of a generated page, or wrong: MkDocs reports it
        return os.path.relpath(site_uri(path), os.path.dirname(uri) or ".") + rest

    return map_links(markdown, change)


def linked_files(pages: Iterable[tuple[str, str]]) -> set[str]:
    """Return the paths of the files outside of docs/ that pages link to, directly or by other files.

    Args:
        pages: path in the repository and Markdown of each page.
    """
    found: set[str] = set()
    remaining = list(pages)
    while remaining:
        path, markdown = remaining.pop()
        links: list[str] = []
        map_links(markdown, lambda link, rest, links=links: links.append(link) or link + rest)
        linked = {os.path.normpath(Path(path).parent / link) for link in links}
        new = {one for one in linked if (ROOT / one).is_file() and not one.startswith("docs/")} - found
        new -= {path for path, page in PAGES.items() if page == "index.md"}
        found |= new
        remaining += [(one, (ROOT / one).read_text()) for one in new if one.endswith(".md")]
    return found


def source_page(path: str) -> str:
    """Return the Markdown of a page that shows a source file."""
    language = {".py": "python", ".toml": "toml", ".json": "json", ".cpp": "cpp"}.get(Path(path).suffix, "text")
    front = "---\nsearch: {exclude: true}\nhide: [navigation, toc]\n---\n"
    return f'{front}# {path}\n\n`````{language} linenums="1"\n{(ROOT / path).read_text()}`````\n'
