"""Conditions of a measurement: device, versions and commit, which every result file contains."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import torch

import dit_sparse

from ..bundled import BUNDLED
from ..composition import nested_methods
from ..gating.gate import gate_weights_digests
from ..method import Method

PACKAGES = ("dit-sparse", "torch", "diffusers", "transformers", "triton", "xformers", "numpy")
DIGESTED = (f"assets/{BUNDLED}", "engine", "generation", "notation", "profiling")  # folders of this package
OF_METHODS = ("dit_sparse.methods.", "dit_sparse.gating.")  # modules that only the methods that import them depend on
MAPPED = ("kernels", "pipelines", "profiles")  # inside the package in a wheel, next to it in a checkout


def conditions(device: str | None = None) -> dict:
    """Return device, versions, commit and load of the machine as plain values for JSON."""
    return {"device": device_name(device), "versions": versions(), "commit": commit(), "load": machine_load()}


def machine_load() -> dict | None:
    """Return the mean number of running processes in the last minute and the number of CPU cores, as ``"average"`` and
    ``"cores"``; None if the system has no load average. It includes the threads of this process."""
    if not hasattr(os, "getloadavg"):
        return None
    return {"average": round(os.getloadavg()[0], 1), "cores": os.cpu_count() or 1}


def is_busy(load: dict | None) -> bool:
    """Whether more processes were running than the machine has cores, so that they slowed each other."""
    return load is not None and load["average"] > load["cores"]


def busy_warning(load: dict | None) -> str | None:
    """Return a warning for timings that end with this load, or None if the machine was not busy."""
    if not is_busy(load):
        return None
    return f"times are not reliable: the load average was {load['average']:g} on {load['cores']} cores"


def device_name(device: str | None = None) -> str:
    """Return the name of the GPU, or of the CPU with its threads and instruction set."""
    if device == "cuda" or (device is None and torch.cuda.is_available()):
        return torch.cuda.get_device_name()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"CPU ({_cpu_name()}), {torch.get_num_threads()} threads, {capability}"


def versions() -> dict[str, str | None]:
    """Return the versions of Python and the packages; None for a package that is not installed."""
    result: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            result[package] = None
    return result


def commit() -> str | None:
    """Return the commit of the checkout, with "+" if files differ from it; None for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def source_digest(*more: Path) -> str:
    """Return a digest of the files that determine the clips of every method: engine, kernels, adapters, profiles,
    bundled weights and ``more``. `method_digest` covers the files of single methods."""
    package, *mapped = map(Path, dit_sparse.__path__)
    folders = [package / name for name in DIGESTED] + [place / name for place in (package, *mapped) for name in MAPPED]
    digest = hashlib.sha256()
    for folder in filter(Path.is_dir, folders):
        for path in _files(folder):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    for path in (*sorted(package.glob("*.py")), *more):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def method_digest(method: Method) -> str:
    """Return a digest of the files that define a method and the methods inside it, of the files of ``methods/`` and
    ``gating/`` that these import, and of trained weights. A new method therefore changes no digest of the others."""
    modules: dict[str, ModuleType] = {}

    def add(name: object) -> None:
        if not isinstance(name, str) or name in modules or not getattr(sys.modules.get(name), "__file__", None):
            return
        modules[name] = sys.modules[name]
        for value in list(vars(modules[name]).values()):
            imported = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(imported, str) and imported.startswith(OF_METHODS):
                add(imported)

    for base in {base for part in nested_methods(method) for base in type(part).__mro__}:
        if not base.__module__.startswith("dit_sparse.") or base.__module__.startswith(OF_METHODS):
            add(base.__module__)
    digest = hashlib.sha256()
    for name in sorted(modules):
        digest.update(name.encode() + b"\0" + Path(modules[name].__file__).read_bytes())
    digest.update("".join(gate_weights_digests(nested_methods(method))).encode())
    return digest.hexdigest()[:16]


def weights_digest(model: str) -> str | None:
    """Return what distinguishes the weights of a model from other versions of the same name.

    Returns:
        For a local folder, a digest of the names, sizes and times of its files; for a model of the hub, the commit in
        the local cache, or None if it is not in the cache; None for the bundled model, which `source_digest` includes.
    """
    if model == BUNDLED:
        return None
    if (folder := Path(model)).is_dir():
        stats = ((path, path.stat()) for path in _files(folder))
        listing = [(path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        return hashlib.sha256(repr(listing).encode()).hexdigest()[:16]
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.load_config(model, local_files_only=True, return_commit_hash=True)[1]
    except OSError:
        return None


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = (
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        )
        return next(names, platform.machine())
    return platform.processor() or platform.machine() or os.name
