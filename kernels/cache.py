"""The cache folder for compiled operators and measured costs."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import shutil
import tempfile
from pathlib import Path

from platformdirs import user_cache_path

_log = logging.getLogger("dit_sparse")


def cache_folder() -> Path:
    """Return ``$DIT_SPARSE_CACHE`` if set, else ``dit_sparse`` in the user's cache folder. It may not exist yet."""
    if chosen := os.environ.get("DIT_SPARSE_CACHE"):
        return Path(chosen)
    return user_cache_path("dit_sparse", appauthor=False)


@functools.cache
def _writable_or_temporary(folder: Path) -> Path:
    """Return ``folder``, created if necessary, or a temporary folder of this process after one warning."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        _log.warning(
            "cannot write to the cache folder %s (%s): kernels are compiled and measured again in every process; "
            "set DIT_SPARSE_CACHE to a writable folder",
            folder,
            error.strerror or error,
        )
        temporary = Path(tempfile.mkdtemp(prefix="dit_sparse_"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        return temporary


def writable_cache_folder() -> Path:
    """Return `cache_folder` if it can be written, otherwise a temporary folder that is removed at exit."""
    return _writable_or_temporary(cache_folder())
