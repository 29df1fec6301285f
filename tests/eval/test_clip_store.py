"""The store of generated clips: keys, damaged files."""

from __future__ import annotations

import numpy as np
import pytest

from dit_sparse.eval.comparison.clip_store import ClipRecord, ClipStore


def test_clips_are_found_by_name_and_key(tmp_path):
    store = ClipStore(tmp_path)
    clip = ClipRecord(np.full((2, 3, 4, 3), 7, np.uint8), {"seconds": 1.5, "mass": [[0.5]]})
    store.put("radial 0.3", {"seed": 0}, clip)
    stored = store.get("radial 0.3", {"seed": 0})
    assert np.array_equal(stored.frames, clip.frames) and stored.metadata == clip.metadata and stored.latents is None
    assert store.get("radial 0.3", {"seed": 1}) is None and store.get("radial 0.4", {"seed": 0}) is None


@pytest.mark.parametrize("content", [b"", b"half a fi", b"PK\x03\x04" + bytes(40)])
def test_damaged_clips_are_missing(tmp_path, content):
    store = ClipStore(tmp_path)
    store.put("x", {}, ClipRecord(np.zeros((1, 2, 2, 3), np.uint8), {}))
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    assert store.get("x", {}) is None


def test_no_damaged_byte_raises(tmp_path):
    """A byte of a zip archive can mean: encrypted, unknown compression, or made by a newer version."""
    store = ClipStore(tmp_path)
    store.put("x", {}, ClipRecord(np.zeros((1, 1, 1, 3), np.uint8), {}))
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x09]) + content[position + 1 :])
        store.get("x", {})
