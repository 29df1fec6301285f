"""Tutorials: notebooks of docs/tutorials, executed and converted to pages of the site.

Notebooks are stored without outputs. An executed notebook is kept in build/docs/tutorials under a digest of itself and
of the library, so that `make docs` executes again only what has changed.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import nbformat

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "docs" / "tutorials"
EXECUTED = ROOT / "build" / "docs" / "tutorials"
LIBRARY = ("dit_sparse", "kernels", "pipelines", "eval")
KERNEL = (sys.executable, "-m", "ipykernel_launcher", "--IPKernelApp.log_level=ERROR", "-f")
TIMEOUT = 900  # seconds for the start of a kernel, and for a cell
ENVIRONMENT = {"COLUMNS": "100", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "NO_COLOR": "1"}


def execute(path: Path) -> nbformat.NotebookNode:
    """Execute a notebook in an empty folder with this interpreter, store and return it.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an exception.
    """
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    class ThisInterpreter(KernelSpecManager):
        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            return KernelSpec(argv=[*KERNEL, "{connection_file}"])

    notebook = nbformat.read(path, as_version=4)
    scripts = os.pathsep.join([str(Path(sys.executable).parent), sysconfig.get_path("scripts"), os.environ["PATH"]])
    with TemporaryDirectory() as folder, mock.patch.dict(os.environ, ENVIRONMENT, PATH=scripts):
        manager = AsyncKernelManager(kernel_spec_manager=ThisInterpreter())
        options = {"timeout": TIMEOUT, "startup_timeout": TIMEOUT, "resources": {"metadata": {"path": folder}}}
        client = NotebookClient(notebook, km=manager, **options)
        client.execute()
    EXECUTED.mkdir(parents=True, exist_ok=True)
    for old in EXECUTED.glob(f"{path.stem}-*.ipynb"):
        old.unlink()
    nbformat.write(notebook, _stored(path))
    return notebook


def executed(path: Path) -> nbformat.NotebookNode:
    """Return a notebook with its outputs, and execute it if that has not been done yet."""
    stored = _stored(path)
    return nbformat.read(stored, as_version=4) if stored.is_file() else execute(path)


def tutorial_files(path: Path) -> Iterator[tuple[str, str | bytes]]:
    """Yield address and content of the page of a notebook, and of its pictures. Warnings and progress are left out."""
    from nbconvert import MarkdownExporter
    from nbconvert.filters import strip_ansi

    notebook = executed(path)
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    for name, content in resources["outputs"].items():
        yield f"tutorials/{path.stem}/{name}", content
    text = strip_ansi(text)
    text = re.sub(r"!\[\w*\]\((output_\w+\.\w+)\)", rf"![Output]({path.stem}/\1)", text)
    text = re.sub(r"\n{3,}", "\n\n", text)
    download = f"[Download this notebook]({path.name}){{ .md-button }}"
    yield f"tutorials/{path.stem}.md", f"{text.strip()}\n\n{download}\n"


def _stored(path: Path) -> Path:
    """Return where an executed notebook is stored."""
    files = [path, *(file for folder in LIBRARY for file in sorted((ROOT / folder).rglob("*.py")))]
    digest = sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
    return EXECUTED / f"{path.stem}-{digest[:16]}.ipynb"
