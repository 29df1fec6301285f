"""What is published: the source distribution, the description on PyPI, and the Dockerfile."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from attention_cases import skip_or_fail

ROOT = Path(__file__).parents[2]
NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "out", "runs", "*.egg-info", "__pycache__", "*.so")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """A source distribution, built from a copy so that no build folder is left here."""
    source, target = tmp_path_factory.mktemp("sdist") / "source", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, source, ignore=NOT_COPIED)
    code = f"import setuptools.build_meta as backend; backend.build_sdist({str(target)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    return next(target.glob("*.tar.gz"))


def test_source_distribution_holds_the_documentation(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*") if path.is_file()}
    expected = {name for name in expected if "__pycache__" not in name}
    expected |= {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "profiles/README.md", "tests/conftest.py"}
    assert expected <= names, sorted(expected - names)
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_description_renders(sdist):
    check = [sys.executable, "-m", "twine", "check", "--strict", str(sdist)]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_dockerfile_passes_its_linter():
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if linter is None:
        skip_or_fail("hadolint is not installed")
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
