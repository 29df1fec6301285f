"""The conditions of a measurement: machine, versions, commit. Every result carries them."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import dit_sparse

PACKAGES = ("dit-sparse", "torch", "diffusers", "transformers", "triton", "xformers", "numpy")


def conditions(device: str | None = None) -> dict:
    """Device, versions and commit, as plain values for JSON."""
    return {"device": device_name(device), "versions": versions(), "commit": commit()}


def device_name(device: str | None = None) -> str:
    """The GPU's name, or the CPU's with its threads and instruction set."""
    if device == "cuda" or (device is None and torch.cuda.is_available()):
        return torch.cuda.get_device_name()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"CPU ({_processor()}), {torch.get_num_threads()} threads, {capability}"


def versions() -> dict[str, str | None]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """The commit of the checkout this package runs from, with "+" where files differ from it; None for a wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def sources() -> str:
    """A digest of all files that decide what attention computes, edited or not: code, kernels, profiles, weights."""
    folders = [Path(place) / name for place in dit_sparse.__path__ for name in ("kernels", "pipelines", "profiles")]
    digest = hashlib.sha256()
    for folder in (Path(dit_sparse.__file__).parent, *filter(Path.is_dir, folders)):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = (
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        )
        return next(names, platform.machine())
    return platform.processor() or platform.machine() or os.name
