"""Where what was built or measured on this machine is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$DIT_SPARSE_CACHE``, else ``dit_sparse`` in the user's cache folder. It may not exist yet."""
    if chosen := os.environ.get("DIT_SPARSE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit_sparse"
